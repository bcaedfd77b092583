"""A model repository of Triton Inference Server: a bundle behind one Python model, and the engines that stand alone.

folder/mmemb/config.pbtxt          the queue, and what `triton_model` reads and answers
folder/mmemb/1/model.py, bundle/   the Embedder, and the bundle with its engines
folder/mmemb_<engine>/...          an engine as a `tensorrt_plan`, with the tensors of the manifest
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mmemb_deploy.backends.choose import CPU, CUDA
from mmemb_deploy.backends.tensorrt.api import TENSORRT
from mmemb_deploy.backends.tensorrt.files import ENGINES, Built, EngineSet, ProfileShapes
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts, Manifest, TensorFacts
from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import write_whole
from mmemb_engines.triton_model import BUNDLE, EMBEDDING, GATE_SCORE, IMAGE, RATIONALE, ROUTE, TEXT

MODEL: Final = "mmemb"
ROWS: Final = 32  # most inputs of a batch where no engine bounds them: what `encode` runs together
PLAN: Final = "model.plan"
TYPES: Final = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
MODEL_PY: Final = '''"""Embeds with the bundle beside this file, as `mmemb_engines.triton_model` says."""

from mmemb_engines.triton_model import TritonPythonModel as TritonPythonModel
'''


class Name(str):
    """A value of an enumeration, which the text of a protobuf shows without quotes."""


Fields = Mapping[str, Any]  # of a message: a value, another message, or a list of either


def write_repository(bundle: Bundle, sets: Sequence[EngineSet], folder: Path, device: int | None) -> list[str]:
    """Write a model repository into a folder; return the names of its models, "mmemb" first.

    `sets` are what `mmemb build` made, all by one library; without any, the model runs on ONNX Runtime. `device` is
    the index of a GPU, None for the CPU. Files are hard links where the file system allows it, and else copies.
    Engines of TensorRT for RTX, which Triton's own backend does not read, and graphs with a cache, whose memory is
    input and output at once, become no models of their own.

    Raises OptionError where a model of these names is there already, and where the sets do not go together.
    """
    libraries = sorted({engines.library for engines in sets})
    if len(libraries) > 1 or (sets and device is None):
        raise OptionError(
            f"the engines are of {' and '.join(libraries)}, for the device {device}: a repository takes those of one "
            "library, and a GPU's index"
        )
    backend = libraries[0] if libraries else CPU if device is None else CUDA
    plans = {} if backend != TENSORRT else dict(_plans(bundle, sets))
    names = [MODEL, *(f"{MODEL}_{name}" for name in plans)]
    for name in names:
        if (folder / name).exists():
            raise OptionError(f"{folder / name} is there already: delete it, or choose another folder")
    _write_model(folder / MODEL, _embedder(bundle, sets, backend, device), "model.py", MODEL_PY)
    shutil.copytree(bundle.folder, folder / MODEL / "1" / BUNDLE, copy_function=_link)
    for name, (built, engine) in plans.items():
        _write_model(folder / f"{MODEL}_{name}", _plan(name, _facts(bundle.manifest, name), built, device))
        _link(engine, folder / f"{MODEL}_{name}" / "1" / PLAN)
    return names


def _plans(bundle: Bundle, sets: Sequence[EngineSet]) -> Iterator[tuple[str, tuple[Built, Path]]]:
    """Yield the engines that serve alone, with what was built and where it lies."""
    if len(sets) > 1:
        raise OptionError(f"there are engines for {len(sets)} devices: Triton takes a plan for one kind of GPU")
    for engines in sets:
        for name, built in engines.engines.items():
            if not any(tensor.name.startswith("past.") for tensor in _facts(bundle.manifest, name).inputs):
                yield name, (built, bundle.folder / ENGINES / engines.folder / built.file)


def _facts(manifest: Manifest, engine: str) -> GraphFacts:
    """Return the graph of an engine, or one of them: they have the same tensors."""
    return manifest.graphs[manifest.engines[engine][0]]


def _embedder(bundle: Bundle, sets: Sequence[EngineSet], backend: str, device: int | None) -> Fields:
    text = {"data_type": Name("TYPE_STRING"), "dims": [1]}
    return {
        "name": MODEL,
        "backend": "python",
        "max_batch_size": most_rows(bundle.manifest, sets),
        "input": [{"name": TEXT, **text, "optional": True}, {"name": IMAGE, **text, "optional": True}],
        "output": [
            {"name": EMBEDDING, "data_type": Name("TYPE_FP32"), "dims": [bundle.manifest.model.hidden_size]},
            {"name": ROUTE, **text},
            {"name": GATE_SCORE, "data_type": Name("TYPE_FP32"), "dims": [1]},
            {"name": RATIONALE, **text},
        ],
        "dynamic_batching": {},
        "instance_group": [_instance(device)],
        "parameters": [{"key": "backend", "value": {"string_value": backend}}],
    }


def most_rows(manifest: Manifest, sets: Sequence[EngineSet]) -> int:
    """Return the most prompts that every set takes in one batch."""
    return min((_prompts(manifest, each)[abi.TOKEN_IDS][2][0] for each in sets), default=ROWS)


def _prompts(manifest: Manifest, engines: EngineSet) -> ProfileShapes:
    """Return the profile of the most prompts, which comes first."""
    roles = engines.roles(manifest)
    name = next(name for role in (abi.DIRECT, abi.EMBEDDER) for name, graphs in roles.items() if role in graphs)
    return engines.engines[name].profiles[0]


def _plan(name: str, graph: GraphFacts, built: Built, device: int | None) -> Fields:
    """Return the configuration of an engine: its first axis is not always the batch, so Triton does not batch it."""
    profiles = [str(index) for index in range(len(built.profiles))]
    return {
        "name": f"{MODEL}_{name}",
        "platform": "tensorrt_plan",
        "max_batch_size": 0,
        "default_model_filename": PLAN,
        "input": [_tensor(tensor) for tensor in graph.inputs],
        "output": [_tensor(tensor) for tensor in graph.outputs],
        "instance_group": [{**_instance(device), "profile": profiles}],
    }


def _instance(device: int | None) -> Fields:
    where = {"kind": Name("KIND_CPU")} if device is None else {"kind": Name("KIND_GPU"), "gpus": [device]}
    return {"count": 1, **where}


def _tensor(tensor: TensorFacts) -> Fields:
    dims = [size if isinstance(size, int) else -1 for size in tensor.shape]
    return {"name": tensor.name, "data_type": Name(TYPES[tensor.dtype]), "dims": dims}


def _write_model(folder: Path, config: Fields, file: str | None = None, content: str = "") -> None:
    (folder / "1").mkdir(parents=True)
    if file is not None:
        write_whole(folder / "1" / file, content)
    write_whole(folder / "config.pbtxt", "".join(f"{line}\n" for line in message_lines(config)))


def message_lines(fields: Fields) -> Iterator[str]:
    """Yield a message in protobuf's text format, line by line."""
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield f"{name} {{"
                yield from (f"  {line}" for line in message_lines(each))
                yield "}"
            elif isinstance(each, Name):
                yield f"{name}: {each}"
            else:  # strings, numbers and booleans look as they do in JSON
                yield f"{name}: {json.dumps(each, ensure_ascii=False)}"


def _link(source: Path | str, target: Path | str) -> None:
    """Put a file in a second place, at no cost where both lie in one file system that knows hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
