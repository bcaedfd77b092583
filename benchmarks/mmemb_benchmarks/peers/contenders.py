"""The ways to run the same weights, each in a process of its own: `python contenders.py NAME`, JSON lines in and out.

A peer's own interpreter runs this file, so that at its head it imports nothing but the standard library. Every way has
`embed(ids)`: embeddings (B, D), L2-normalised, of prompts, which are token ids, all of one length. Most also have
`write(ids, tokens)`: the prompts, and so many tokens after each, greedily. To think and embed is to write, then to
embed the whole anew, for all but a bundle, whose `think_and_embed` is one pass. A result is complete when a call
returns. Seconds are taken around the call, here, so that no exchange of messages counts. Whatever a library prints goes
to standard error.
"""

# A peer's packages are in an environment of its own.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Ids = list[list[int]]

INSTRUCTION = ""  # of the prompts, whose prefix is then the system message alone


class Transformers:
    """transformers, as its users run it; the practice of two passes embeds prompt and rationale anew."""

    def __init__(
        self,
        checkpoint: str,
        threads: int,
        device: str,
        *,
        dtype: str = "float32",
        attention: str = "sdpa",
        compiled: str | None = None,
    ) -> None:
        """`compiled` is a mode of torch.compile; then keys and values are written to a cache of fixed size."""
        import torch
        from transformers import AutoModelForImageTextToText

        torch.set_num_threads(threads)
        self._torch, self._device = torch, device
        model: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=attention, device_map=device
        )
        self._model = model.eval()
        self._hidden: Any = model.model
        self._options: dict[str, Any] = {}
        if compiled is not None:
            self._hidden = torch.compile(model.model, mode=compiled, dynamic=False)
            self._options["cache_implementation"] = "static"

    def embed(self, ids: Ids) -> Any:
        """Pool the last token."""
        ids_BT = self._torch.tensor(ids, device=self._device)
        with self._torch.inference_mode():
            hidden_BTD = self._hidden(input_ids=ids_BT, use_cache=False).last_hidden_state
            return self._torch.nn.functional.normalize(hidden_BTD[:, -1].float(), dim=-1).cpu().numpy()

    def write(self, ids: Ids, tokens: int) -> Any:
        """Generate greedily."""
        ids_BT = self._torch.tensor(ids, device=self._device)
        with self._torch.inference_mode():
            written: Any = self._model.generate(
                input_ids=ids_BT,
                attention_mask=self._torch.ones_like(ids_BT),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                **self._options,
            )
            return written.cpu().tolist()


def text_model(checkpoint: str, folder: Path) -> Any:
    """Save the language model and its tokenizer as a checkpoint of text alone; return the model in float32."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    whole: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32")
    model = whole.model.language_model.eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # with one, a text would be wrapped as a message
    return model


def texts_of(folder: Path) -> Callable[[Ids], list[str]]:
    """Return what decodes prompts for a peer that takes texts; it raises ValueError where their tokens are others."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def decode(ids: Ids) -> list[str]:
        texts = [tokenizer.decode(row) for row in ids]
        if tokenizer(texts)["input_ids"] != ids:
            raise ValueError("a prompt does not survive decoding and tokenising")
        return texts

    return decode


class SentenceTransformers:
    """sentence-transformers over the language model; it only embeds."""

    def __init__(self, checkpoint: str, threads: int, device: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Normalize, Pooling, Transformer

        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as made:
            size = text_model(checkpoint, Path(made)).config.hidden_size
            transformer = Transformer(made, model_kwargs={"dtype": "float32", "attn_implementation": "sdpa"})
            self._texts = texts_of(Path(made))
        modules = [transformer, Pooling(size, pooling_mode="lasttoken"), Normalize()]
        self._model: Any = SentenceTransformer(modules=modules, device=device)

    def embed(self, ids: Ids) -> Any:
        """Tokenise and embed."""
        return self._model.encode(self._texts(ids), batch_size=len(ids))


class OpenVino:
    """OpenVINO, the language model's weights compressed to 8 bits by NNCF's defaults; it only embeds.

    With `genai` its EmbeddingPipeline tokenises and pools too.
    """

    def __init__(self, checkpoint: str, threads: int, device: str, *, genai: bool = False) -> None:
        import nncf
        import openvino
        import torch

        folder = Path(tempfile.mkdtemp())
        model = text_model(checkpoint, folder)

        class LastHidden(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

        example = {name: torch.ones((2, 8), dtype=torch.long) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            converted = openvino.convert_model(LastHidden(), example_input=example)
        converted.outputs[0].get_tensor().set_names({"last_hidden_state"})
        compressed = nncf.compress_weights(converted)
        self._pipeline: Any = None
        if not genai:
            options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            self._compiled: Any = openvino.Core().compile_model(compressed, device.upper(), options)
        else:
            import openvino_genai
            from openvino_tokenizers import convert_tokenizer
            from transformers import AutoTokenizer

            self._texts = texts_of(folder)
            openvino.save_model(compressed, folder / "openvino_model.xml", compress_to_fp16=False)
            tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(folder))
            openvino.save_model(tokenizer, folder / "openvino_tokenizer.xml")
            pipeline = openvino_genai.TextEmbeddingPipeline
            config = pipeline.Config()
            config.pooling_type, config.normalize = pipeline.PoolingType.LAST_TOKEN, True
            self._pipeline = pipeline(str(folder), device.upper(), config, INFERENCE_NUM_THREADS=threads)
        shutil.rmtree(folder)

    def embed(self, ids: Ids) -> Any:
        """Pool the last token."""
        import numpy as np

        if self._pipeline is not None:
            return np.array(self._pipeline.embed_documents(self._texts(ids)), np.float32)
        ids_BT = np.array(ids, np.int64)
        hidden_BTD = self._compiled({"input_ids": ids_BT, "attention_mask": np.ones_like(ids_BT)})[0]
        return hidden_BTD[:, -1] / np.linalg.norm(hidden_BTD[:, -1], axis=-1, keepdims=True)


class Vllm:
    """vLLM in bfloat16: one engine embeds, and another writes, for it does not do both."""

    def __init__(self, checkpoint: str, threads: int, device: str) -> None:
        if device == "cpu":
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        from vllm import LLM

        options: dict[str, Any] = {
            "model": checkpoint,
            "dtype": "bfloat16",
            "limit_mm_per_prompt": {"image": 0, "video": 0},
            "max_model_len": 4096,
            "kv_cache_memory_bytes": 2 << 30,
            "gpu_memory_utilization": 0.1,
            "enable_prefix_caching": False,  # a prompt comes three times: to embed, to write, to do both
        }
        self._embedder = LLM(runner="pooling", convert="embed", **options)
        self._writer = LLM(runner="generate", **options)

    def embed(self, ids: Ids) -> Any:
        """Pool the last token."""
        import numpy as np

        found = self._embedder.embed([{"prompt_token_ids": row} for row in ids], use_tqdm=False)
        return np.array([each.outputs.embedding for each in found], np.float32)

    def write(self, ids: Ids, tokens: int) -> Any:
        """Generate greedily."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        found = self._writer.generate([{"prompt_token_ids": row} for row in ids], how, use_tqdm=False)
        return [row + list(each.outputs[0].token_ids) for row, each in zip(ids, found, strict=True)]


class OwnBundle:
    """A bundle of ours, whose reasoning path goes on from the cache that the prompt left: one pass."""

    def __init__(self, checkpoint: str, threads: int, device: str, *, folder: str) -> None:
        from mmemb_benchmarks.workload import assemble, load_uncached

        del checkpoint
        backend = "onnxruntime" if device == "cpu" else "onnxruntime-cuda"
        embedder = assemble(*load_uncached(Path(folder), backend, threads if device == "cpu" else None))
        self._fast_path, self._generator = embedder.paths.fast_path, embedder.paths.generator
        self._markers = list(embedder.manifest.markers.values())
        self._prefix = embedder.encoder.prompt.prefix_length(INSTRUCTION)
        self._batch_tokens = embedder.manifest.batch.tokens

    def _prefill(self, ids: Ids) -> Any:
        """Run the fast path, in batches as large as the bundle allows."""
        import numpy as np

        from mmemb_deploy.inputs.rows import Row

        positions = np.tile(np.arange(len(ids[0])), (3, 1))
        shown = np.zeros(len(ids[0]), np.int64)
        rows = [Row(np.array(row, np.int64), positions, (), shown, self._prefix) for row in ids]
        size = max(1, self._batch_tokens // len(ids[0]))
        return [self._fast_path.run(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _generate(self, ids: Ids, tokens: int) -> Any:
        return self._generator.generate([found.cache for found in self._prefill(ids)], tokens, self._choose)

    def _choose(self, logits_BW: Any) -> Any:
        logits_BW[:, self._markers] = -float("inf")  # no marker ends a rationale early
        return logits_BW.argmax(axis=1)

    def embed(self, ids: Ids) -> Any:
        """Run the fast path."""
        import numpy as np

        return np.concatenate([found.embeddings_BD for found in self._prefill(ids)])

    def write(self, ids: Ids, tokens: int) -> Any:
        """Run the reasoning path, whose markers around a rationale are as many steps as three tokens."""
        return [list(found.token_ids) for found in self._generate(ids, tokens - 3)]

    def think_and_embed(self, ids: Ids, tokens: int) -> Any:
        """Run the reasoning path: its last step embeds."""
        import numpy as np

        return np.stack([found.embedding_D for found in self._generate(ids, tokens)])


def llama_cpp(**load: Any) -> Any:
    """Return llama.cpp, which fills a file of its own beside this one."""
    return import_module("llama_cpp_contender").LlamaCpp(**load)


CONTENDERS: dict[str, Callable[..., Any]] = {
    "transformers": Transformers,
    "sentence-transformers": SentenceTransformers,
    "openvino": OpenVino,
    "llama.cpp": llama_cpp,
    "vllm": Vllm,
    "bundle": OwnBundle,
}


def serve(name: str) -> None:
    """Answer requests until standard input ends: first what the contender needs to load, then calls."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    contender = CONTENDERS[name](**json.loads(sys.stdin.readline()))

    def think_then_embed(ids: Ids, tokens: int) -> Any:
        return contender.embed(contender.write(ids, tokens))

    calls: dict[str, Callable[..., Any]] = {"embed": contender.embed}
    if hasattr(contender, "write"):
        calls["write"] = contender.write
        calls["think_and_embed"] = getattr(contender, "think_and_embed", think_then_embed)
    answer({"calls": list(calls)})
    for line in sys.stdin:
        request = json.loads(line)
        arguments = [request["ids"]] if request["call"] == "embed" else [request["ids"], request["tokens"]]
        began = time.perf_counter()
        found = calls[request["call"]](*arguments)
        seconds = time.perf_counter() - began
        answer({"seconds": seconds, "found": found if isinstance(found, list) else found.tolist()})


if __name__ == "__main__":
    serve(sys.argv[1])
