"""A model's weights as safetensors files, of which one is in memory at a time: sharded weights are gathered one by one.

The files are those that transformers writes, `model.safetensors` or several and their index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

INDEX = "model.safetensors.index.json"
FILE_BYTES = 4 * 2**30


def named_weights(model: Any) -> dict[str, Tensor]:
    """Return the parameters and the buffers that a checkpoint holds, by name; of tied ones the first."""
    stored: dict[str, Tensor] = model.state_dict()
    names = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
    return {name: stored[name] for name in names if name in stored}


def gathered(weight: Tensor) -> Tensor:
    """Return a weight whole, on the CPU; every process that holds a part of it has to call this."""
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return whole.detach().cpu().contiguous()


def write_weights(
    outline: Mapping[str, Tensor],
    value_of: Callable[[str], Tensor],
    folder: Path,
    *,
    writes: bool = True,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write weights of the shapes and types in `outline`; `value_of` is asked for each once, in order.

    Where `writes` is False it is only asked: a process that helps to gather sharded weights holds one at a time.
    """
    shapes = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in outline.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=file_bytes)
    for file, names in split.filename_to_tensors.items():
        held: dict[str, Tensor] = {}
        for name in names:
            value = value_of(name)
            if writes:
                held[name] = value
        if writes:
            save_file(held, folder / file, metadata={"format": "pt"})
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
