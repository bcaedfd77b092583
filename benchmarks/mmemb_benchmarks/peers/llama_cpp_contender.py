"""llama.cpp over token ids, for contenders.py: the language model as GGUF, and its own functions."""

# A peer's packages are in an environment of its own, whose interpreter imports this file.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

Ids = list[list[int]]

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
    _, block, layer = name.removesuffix(".weight").split(".", 2)
    return f"blk.{block}.{GGUF_NAMES[layer]}.weight"


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
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._width = llama_cpp.llama_model_n_embd(self._model)

    def _context(self, rows: int, length: int, *, embeds: bool) -> Any:
        """Return an empty context for so many rows of so many tokens."""
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
        index = 0
        for row, tokens in enumerate(ids):
            for position, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, start + position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = every or position == len(tokens) - 1
                index += 1
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
            logits = np.ctypeslib.as_array(self._llama.llama_get_logits(context), (len(ids), self._vocabulary))
            fed = [[int(row.argmax())] for row in logits]
            for row, (token,) in zip(written, fed, strict=True):
                row.append(token)
        return [prompt + row for prompt, row in zip(ids, written, strict=True)]
