"""The ways to run the same weights, each in a process of its own: `python contenders.py NAME`, JSON lines in and out.

A peer's own interpreter runs this file, so that at its head it imports nothing but the standard library. Prompts are
token ids, all of one length. Seconds are taken around the call, here, so that no exchange of messages counts; a GPU is
synchronised first. Whatever a library prints goes to standard error.
"""

# A peer's packages are in an environment of its own.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

Ids = list[list[int]]

INSTRUCTION = ""  # of the prompts, whose head is then the system message alone


class Contender(Protocol):
    """Embeds prompts; most also write tokens after them. A result is complete when a call returns."""

    def embed(self, ids: Ids) -> Any:
        """Return embeddings (B, D), L2-normalised."""
        ...

    def write(self, ids: Ids, tokens: int) -> Any:
        """Prefill prompts, then write so many tokens after each, greedily; return them."""
        ...

    def think_and_embed(self, ids: Ids, tokens: int) -> Any:
        """Write so many tokens, and embed each prompt with them."""
        ...


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

    def think_and_embed(self, ids: Ids, tokens: int) -> Any:
        """Generate, then run the whole sequence again."""
        return self.embed(self.write(ids, tokens))


def text_model(checkpoint: str, folder: Path) -> Any:
    """Save the language model and its tokenizer as a checkpoint of text alone; return the model in float32."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    whole: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32")
    model = whole.model.language_model.eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # with one, a text would be wrapped as a message
    return model


class Texts:
    """Decodes prompts for a peer that takes texts alone, and holds that it reads the same tokens."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def of(self, ids: Ids) -> list[str]:
        """Return texts; raises ValueError where their tokens are others."""
        texts = [self._tokenizer.decode(row) for row in ids]
        if self._tokenizer(texts)["input_ids"] != ids:
            raise ValueError("a prompt does not survive decoding and tokenising")
        return texts


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
            self._texts = Texts(Path(made))
        modules = [transformer, Pooling(size, pooling_mode="lasttoken"), Normalize()]
        self._model: Any = SentenceTransformer(modules=modules, device=device)

    def embed(self, ids: Ids) -> Any:
        """Tokenise and embed."""
        return self._model.encode(self._texts.of(ids), batch_size=len(ids))


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

            self._texts = Texts(folder)
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
            return np.array(self._pipeline.embed_documents(self._texts.of(ids)), np.float32)
        ids_BT = np.array(ids, np.int64)
        hidden_BTD = self._compiled({"input_ids": ids_BT, "attention_mask": np.ones_like(ids_BT)})[0]
        return hidden_BTD[:, -1] / np.linalg.norm(hidden_BTD[:, -1], axis=-1, keepdims=True)


GGUF_NAMES = {  # in transformers and in llama.cpp
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: str, target: Path, kind: str) -> None:
    """Write the language model as a Qwen3 of llama.cpp, which it is where no picture moves the rotary positions."""
    import gguf

    config = json.loads((Path(checkpoint) / "config.json").read_text())["text_config"]
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    quantised = gguf.GGMLQuantizationType[kind.upper()]
    for name, values in _tensors(Path(checkpoint)):
        whole = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else quantised
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, whole), raw_dtype=whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor of the language model."""
    if not name.startswith("layers."):
        return GGUF_NAMES[name.removesuffix(".weight")] + ".weight"
    _, place, layer = name.removesuffix(".weight").split(".", 2)
    return f"blk.{place}.{GGUF_NAMES[layer]}.weight"


def _tensors(checkpoint: Path) -> Any:
    """Yield name and float32 values of the language model's tensors, as safetensors lays them out."""
    import numpy as np

    tied = json.loads((checkpoint / "config.json").read_text()).get("tie_word_embeddings", False)
    for path in sorted(checkpoint.glob("*.safetensors")):
        raw = np.memmap(path, np.uint8, "r")
        length = struct.unpack("<Q", raw[:8].tobytes())[0]
        for name, facts in json.loads(raw[8 : 8 + length].tobytes()).items():
            short = name.removeprefix("model.").removeprefix("language_model.")
            if name == "__metadata__" or "visual" in name or (tied and short == "lm_head.weight"):
                continue
            begin, end = (8 + length + offset for offset in facts["data_offsets"])
            values = raw[begin:end]
            if facts["dtype"] == "BF16":
                floats = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                floats = values.view({"F32": np.float32, "F16": np.float16}[facts["dtype"]]).astype(np.float32)
            yield short, floats.reshape(facts["shape"])


class LlamaCpp:
    """llama.cpp by its own functions, over token ids."""

    def __init__(self, checkpoint: str, threads: int, device: str, *, kind: str) -> None:
        import llama_cpp

        del device
        self._llama: Any = llama_cpp
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as made:
            write_gguf(checkpoint, Path(made) / "model.gguf", kind)
            options = llama_cpp.llama_model_default_params()
            options.use_mmap = False
            self._model = llama_cpp.llama_model_load_from_file(str(Path(made) / "model.gguf").encode(), options)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the model")
        self._threads = threads
        self._contexts: dict[tuple[int, int, bool], Any] = {}
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._width = llama_cpp.llama_model_n_embd(self._model)

    def _context(self, rows: int, length: int, *, embeds: bool) -> Any:
        """Return an empty context with room for so many rows of so many tokens."""
        key = rows, length, embeds
        if key not in self._contexts:
            options = self._llama.llama_context_default_params()
            options.n_ctx = options.n_batch = rows * length  # computed 512 tokens at a time, as by default
            options.n_seq_max, options.n_threads, options.n_threads_batch = rows, self._threads, self._threads
            options.embeddings = embeds
            if embeds:
                options.pooling_type = self._llama.LLAMA_POOLING_TYPE_LAST
            self._contexts[key] = self._llama.llama_init_from_model(self._model, options)
        context = self._contexts[key]
        self._llama.llama_memory_clear(self._llama.llama_get_memory(context), True)
        return context

    def _run(self, context: Any, ids: Ids, start: int, *, every: bool) -> None:
        """Decode tokens of every row from a position on; outputs are wanted of `every` token, or of the last ones."""
        count = sum(map(len, ids))
        batch = self._llama.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        place = 0
        for row, tokens in enumerate(ids):
            for position, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, start + position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = every or position == len(tokens) - 1
                place += 1
        status = self._llama.llama_decode(context, batch)
        self._llama.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def embed(self, ids: Ids) -> Any:
        """Pool the last token, as its own tools do; a context that embeds computes logits of every token too."""
        import numpy as np

        context = self._context(len(ids), len(ids[0]), embeds=True)
        self._run(context, ids, 0, every=True)
        found = [
            np.ctypeslib.as_array(self._llama.llama_get_embeddings_seq(context, row), (self._width,)).copy()
            for row in range(len(ids))
        ]
        vectors_BD = np.stack(found)
        return vectors_BD / np.linalg.norm(vectors_BD, axis=1, keepdims=True)

    def write(self, ids: Ids, tokens: int) -> Any:
        """Decode greedily."""
        import numpy as np

        length = len(ids[0])
        context = self._context(len(ids), length + tokens, embeds=False)
        written: Ids = [[] for _ in ids]
        fed, start = ids, 0
        for step in range(tokens):
            self._run(context, fed, start, every=False)
            start = length + step
            logits = np.ctypeslib.as_array(self._llama.llama_get_logits(context), (len(ids), self._words))
            fed = [[int(row.argmax())] for row in logits]
            for row, (token,) in zip(written, fed, strict=True):
                row.append(token)
        return [prompt + row for prompt, row in zip(ids, written, strict=True)]

    def think_and_embed(self, ids: Ids, tokens: int) -> Any:
        """Write, then run the whole sequence again: contexts that embed give no logits."""
        return self.embed(self.write(ids, tokens))


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

    def think_and_embed(self, ids: Ids, tokens: int) -> Any:
        """Generate, then run the whole sequence through the engine that embeds."""
        return self.embed(self.write(ids, tokens))


class Bundle:
    """A bundle of ours, whose reasoning path goes on from the cache that the prompt left: one pass."""

    def __init__(self, checkpoint: str, threads: int, device: str, *, folder: str) -> None:
        from mmemb_benchmarks.workload import assemble, load_uncached

        del checkpoint
        backend = "onnxruntime" if device == "cpu" else "onnxruntime-cuda"
        embedder = assemble(*load_uncached(Path(folder), backend, threads if device == "cpu" else None))
        self._fast_path, self._generator = embedder.pipeline.fast_path, embedder.pipeline.generator
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

    def _generate(self, ids: Ids, words: int) -> Any:
        return self._generator.generate([found.cache for found in self._prefill(ids)], words, self._choose)

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


CONTENDERS: dict[str, Any] = {
    "transformers": Transformers,
    "sentence-transformers": SentenceTransformers,
    "openvino": OpenVino,
    "llama.cpp": LlamaCpp,
    "vllm": Vllm,
    "bundle": Bundle,
}


def serve(name: str) -> None:
    """Answer requests until standard input ends: first what the contender needs to load, then calls."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    contender: Contender = CONTENDERS[name](**json.loads(sys.stdin.readline()))
    calls = [call for call in ("embed", "write", "think_and_embed") if hasattr(contender, call)]
    answer({"calls": calls})
    for line in sys.stdin:
        request = json.loads(line)
        arguments = [request["ids"], request["tokens"]][: 1 if request["call"] == "embed" else 2]
        began = time.perf_counter()
        found = getattr(contender, request["call"])(*arguments)
        seconds = time.perf_counter() - began
        answer({"seconds": seconds, "found": found if isinstance(found, list) else found.tolist()})


if __name__ == "__main__":
    serve(sys.argv[1])
