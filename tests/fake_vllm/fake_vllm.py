"""A strict fake of a vLLM server (0.32) that holds a checkpoint: what served rollouts use of it, and nothing else.

It renders chats by the checkpoint's own template, puts visuals in place as transformers' processors have since 5.10,
draws from the model and answers as vLLM does. A field that vLLM does not know is a 400, as is one that needs a flag
which the server was not started with; sampling that is left to the server's own defaults fails the test. Adapters are
merged into a copy of the weights by peft's formula; weights are reloaded from a folder.
"""

import base64
import io
import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmemb_deploy.inputs.preprocess import rotary_positions, temporal_patches
from mmemb_deploy.inputs.prompts import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from mmemb_deploy.inputs.rows import Row, collate
from mmemb_training.checkpoint import Checkpoint, load_checkpoint
from mmemb_training.prefill import prefill

SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
KNOWN = SAMPLING | {
    *("model", "messages", "n", "seed", "max_tokens", "logprobs", "logit_bias", "stop_token_ids", "ignore_eos"),
    *("return_token_ids", "return_tokens_as_token_ids", "mm_processor_kwargs", "media_io_kwargs"),
}
NEUTRAL = dict.fromkeys(("temperature", "top_p", "repetition_penalty"), 1.0) | dict.fromkeys(
    ("top_k", "min_p", "presence_penalty", "frequency_penalty"), 0.0
)


class BadRequestError(Exception):
    """What the server answers with 400."""


@dataclass
class FakeVllm:
    """Answers requests to paths; `weights` are by the name that they are served under."""

    folder: Path
    name: str = "policy"
    trusts_mm_kwargs: bool = True
    absent: tuple[str, ...] = ()  # routes that it was not started with
    checkpoint: Checkpoint = field(init=False)
    adapters: dict[str, Path] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checkpoint = load_checkpoint(self.folder)
        self._merged: dict[str, Any] = {}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)

    def get(self, path: str) -> tuple[int, Any]:
        assert path == "/v1/models"
        return 200, {"data": [{"id": name} for name in (self.name, *self.adapters)]}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        routes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/v1/chat/completions": self._complete,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
            "/collective_rpc": self._reload,
            "/reset_prefix_cache": lambda _: {"success": True},
            "/reset_encoder_cache": lambda _: "",
        }
        if path not in routes or path in self.absent:
            return 404, {"detail": "Not Found"}
        self.calls.append(path)
        try:
            return 200, routes[path](body)
        except BadRequestError as error:
            return 400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}}

    def _load(self, body: dict[str, Any]) -> str:
        assert body.keys() == {"lora_name", "lora_path"}
        path = Path(body["lora_path"])
        assert {file.name for file in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        if body["lora_name"] in self.adapters:
            raise BadRequestError("the adapter is loaded already")
        self.adapters[body["lora_name"]] = path
        return "Success"

    def _unload(self, body: dict[str, Any]) -> str:
        del self.adapters[body["lora_name"]]
        return "Success"

    def _reload(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        model = AutoModelForImageTextToText.from_pretrained(body["kwargs"]["weights_path"])
        self.checkpoint.model.load_state_dict(model.state_dict())
        return {"results": [None]}

    def _model(self, name: str) -> Any:
        if name == self.name:
            return self.checkpoint.model
        if name not in self.adapters:
            raise BadRequestError(f"no model {name}")
        if name in self._merged:
            return self._merged[name]
        model = self._merged[name] = load_checkpoint(self.folder).model
        config = json.loads((self.adapters[name] / "adapter_config.json").read_text())
        tensors = load_file(self.adapters[name] / "adapter_model.safetensors")
        for key in sorted(one for one in tensors if one.endswith(".lora_A.weight")):
            assert key.startswith("base_model.model.model.language_model.layers."), key
            module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            delta = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * config["lora_alpha"] / config["r"]
            module.weight.data += delta
        return model

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if unknown := body.keys() - KNOWN:
            raise BadRequestError(f"unknown: {sorted(unknown)}")
        if not self.trusts_mm_kwargs and {"mm_processor_kwargs", "media_io_kwargs"} & body.keys():
            raise BadRequestError("Start the server with --trust-request-mm-kwargs")
        assert {name: body[name] for name in NEUTRAL} == NEUTRAL
        row = self._row(body)
        self.prompts.append(row.token_ids_S.tolist())
        choices = self._draw(self._model(body["model"]), row, body)
        return {"choices": choices, "prompt_token_ids": row.token_ids_S.tolist()}

    def _draw(self, model: Any, row: Row, body: dict[str, Any]) -> list[dict[str, Any]]:
        generators = [torch.Generator().manual_seed(body["seed"] + index) for index in range(body["n"])]
        drawn: list[list[int]] = [[] for _ in generators]
        content: list[list[dict[str, Any]]] = [[] for _ in generators]

        def stopped(tokens: list[int]) -> bool:
            return bool(tokens) and tokens[-1] in body["stop_token_ids"]

        for _ in range(body["max_tokens"]):
            going = [index for index, tokens in enumerate(drawn) if not stopped(tokens)]
            if not going:
                break
            rows = [row.extended(drawn[index]) for index in going]
            with torch.no_grad():
                hidden_BSD, _ = prefill(model, collate(rows, 0), self.checkpoint.vision)
                logits_BV = model.lm_head(hidden_BSD[:, -1])
            biased_BV = logits_BV.clone()
            biased_BV[:, [int(token) for token in body["logit_bias"]]] += torch.tensor([*body["logit_bias"].values()])
            for index, biased_V, logits_V in zip(going, biased_BV, logits_BV, strict=True):
                token = int(torch.multinomial(biased_V.softmax(0), 1, generator=generators[index]))
                drawn[index].append(token)  # beside it, as vLLM has it, what the logits say without the bias
                content[index].append({"token": f"token_id:{token}", "logprob": float(logits_V.log_softmax(0)[token])})
        return [
            {
                "index": index,
                "finish_reason": "stop" if stopped(tokens) else "length",
                "message": {"role": "assistant", "content": self.tokenizer.decode(tokens)},
                "token_ids": tokens,
                "logprobs": {"content": content[index]},
            }
            for index, tokens in enumerate(drawn)
        ]

    def _row(self, body: dict[str, Any]) -> Row:
        """Return the prompt as a server of the checkpoint reads it; media keep their size, as is asked."""
        ids, spec = self.checkpoint.rows.prompt.ids, self.checkpoint.vision
        kinds = {"image_url": "image", "video_url": "video", "text": "text"}
        messages = [
            message
            if isinstance(message["content"], str)
            else message | {"content": [part | {"type": kinds[part["type"]]} for part in message["content"]]}
            for message in body["messages"]
        ]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        parts = [part for message in body["messages"] for part in message["content"] if isinstance(part, dict)]
        images = iter([picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"])
        videos = iter([part["video_url"]["url"] for part in parts if part["type"] == "video_url"])
        shown: list[Any] = []
        tokens: list[int] = []
        for token in rendered:
            if token == ids[IMAGE_PAD]:
                assert body["mm_processor_kwargs"] == {"do_resize": False}
                (visual,) = temporal_patches([next(images)], replace(spec, temporal_patch_size=1))
                shown.append(visual)
                tokens += [token] * visual.tokens
            elif token == ids[VIDEO_PAD]:
                told = body["media_io_kwargs"]["video"]
                frames = frames_of(next(videos))
                assert told["num_frames"] == -1
                assert len(told["frames_indices"]) == len(frames) <= told["total_num_frames"]
                seconds = [index / told["fps"] for index in told["frames_indices"]]
                for place, visual in enumerate(temporal_patches(frames, spec)):
                    mean = (seconds[2 * place] + seconds[2 * place + 1]) / 2
                    time = self.tokenizer.encode(f"<{mean:.1f} seconds>", add_special_tokens=False)
                    tokens += [*time, ids[VISION_START], *[token] * visual.tokens, ids[VISION_END]]
                    shown.append(visual)
            else:
                tokens.append(token)
        return self._laid_out(tokens, shown)

    def _laid_out(self, tokens: list[int], shown: list[Any]) -> Row:
        ids, spec = self.checkpoint.rows.prompt.ids, self.checkpoint.vision
        pads = ids[IMAGE_PAD], ids[VIDEO_PAD]
        token_ids_S = np.asarray(tokens, np.int64)
        shown_S = np.isin(token_ids_S, pads)
        positions = rotary_positions(tokens, shown, pads, spec.merge_size)
        return Row(token_ids_S, positions, tuple(shown), np.where(shown_S, shown_S.cumsum(), 0))


def picture(url: str) -> Any:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]))


def frames_of(url: str) -> list[Any]:
    head, _, data = url.partition(",")
    assert head == "data:video/jpeg;base64"
    return [picture(f"data:image/png;base64,{frame}") for frame in data.split(",")]


class Handler(BaseHTTPRequestHandler):
    """One request of a FakeVllm, which the server holds."""

    def do_GET(self) -> None:
        self._answer(*self.server.vllm.get(self.path))  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(*self.server.vllm.post(self.path, body))  # type: ignore[attr-defined]

    def _answer(self, status: int, content: Any) -> None:
        plain = isinstance(content, str)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if plain else "application/json")
        self.end_headers()
        self.wfile.write(content.encode() if plain else json.dumps(content).encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
        """Say nothing."""


@contextmanager
def serving(vllm: FakeVllm) -> Generator[str]:
    """Serve a FakeVllm, one request at a time; yield its base_url."""
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.vllm = vllm  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()
