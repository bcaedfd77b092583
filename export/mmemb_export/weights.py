"""A checkpoint's weights, read from its files one tensor at a time, and written beside graphs in the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir
import torch
from safetensors import safe_open

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs import prompts
from mmemb_training.checkpoint import Checkpoint

EXTERNAL_BYTES = 1024  # smaller tensors stay inside the graph
ALIGNMENT = 4096  # of a tensor in a weight file, in bytes, so that it can be mapped into memory
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


class CheckpointWeights:
    """Looks up the parameters and buffers of a checkpoint's parts (`mmemb_training.parts`) by the parts' names.

    Parameters have the outline's float type, whatever type the files hold.
    """

    def __init__(self, folder: Path, outline: Checkpoint) -> None:
        """Read the index of a checkpoint's files; raises OptionError if it has no weights."""
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
            self._homes = {name: folder / file for name, file in names.items()}
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._homes = dict.fromkeys(file.keys(), single)
        else:
            raise OptionError(f"{folder} has no weights: neither {single.name} nor {index.name} is there")
        self._dtype = outline.model.dtype
        config = outline.model.config.text_config
        rotary = type(outline.model.model.language_model.rotary_emb)(config=config)
        self._buffers: dict[str, torch.Tensor] = {"language_model.rotary_emb.inv_freq": rotary.inv_freq}
        self._ids = outline.rows.prompt.ids

    def __call__(self, name: str) -> torch.Tensor:
        """Return the values of one parameter or buffer; raises OptionError if the checkpoint lacks it."""
        if name in self._buffers:
            return self._buffers[name]
        if name == "rows_2D":  # of the gate
            return self(HEAD)[[self._ids[prompts.THINK], self._ids[prompts.STOP]]]
        stored = name if name.startswith("lm_head") else f"model.{name}"
        if stored == HEAD and HEAD not in self._homes:
            stored = EMBEDDING  # tied
        if stored not in self._homes:
            raise OptionError(f"the checkpoint has no weight {stored!r}; save it again with save_pretrained")
        with safe_open(self._homes[stored], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored).to(self._dtype)
        return tensor


def save(models: Sequence[ir.Model], paths: Sequence[Path], weights: Path) -> None:
    """Write graphs beside one weight file, which holds tensors of equal bytes once; read one tensor at a time."""
    written: dict[str, tuple[int, int]] = {}
    with weights.open("wb") as file:
        for model in models:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes >= EXTERNAL_BYTES:
                    value.const_value = _externalise(tensor, file, weights, written)
    for model, path in zip(models, paths, strict=True):
        ir.save(model, path)


def _externalise(
    tensor: ir.TensorProtocol, file: BinaryIO, weights: Path, written: dict[str, tuple[int, int]]
) -> ir.ExternalTensor:
    data = tensor.tobytes()
    key = hashlib.sha256(data).hexdigest()
    if key not in written:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        written[key] = file.tell(), len(data)
        file.write(data)
    offset, length = written[key]
    shape: Any = tensor.shape
    return ir.ExternalTensor(
        weights.name, offset, length, tensor.dtype, shape=shape, name=tensor.name or "", base_dir=weights.parent
    )
