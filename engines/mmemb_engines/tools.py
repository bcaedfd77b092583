"""NVIDIA's own tools on our graphs and engines: command lines of trtexec and Polygraphy, and the inputs they read.

The flags are those that trtexec 10.16 and 11 both have, and Polygraphy 0.53.6.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.device import Shape
from mmemb_deploy.backends.tensorrt.files import ProfileShapes
from mmemb_deploy.bundle.manifest import GraphFacts, TensorFacts
from mmemb_deploy.errors import check_known
from mmemb_deploy.files import write_whole

Arrays = Mapping[str, NDArray[Any]]  # by the name of the input or output

BUILD_FLAGS: Final = (
    "builderOptimizationLevel",
    "decomposableAttentions",
    "device",
    "hardwareCompatibilityLevel",
    "memPoolSize",
    "profilingVerbosity",
    "refit",
    "saveEngine",
    "stripWeights",
    "timingCacheFile",
    "versionCompatible",
)
BOUNDS: Final = ("min", "opt", "max")


def trtexec_build(
    graph: Path, profiles: Sequence[ProfileShapes], options: Mapping[str, str | int | bool] | None = None
) -> str:
    """Return the command that builds a graph as `mmemb build` does: strongly typed, without TF32, with its profiles.

    `options` are flags of BUILD_FLAGS, without their dashes: {"saveEngine": "a.engine", "refit": True}. In float32,
    attention also needs {"decomposableAttentions": "*"}. Raises OptionError for another flag.
    """
    words = ["trtexec", f"--onnx={graph}", "--stronglyTyped", "--noTF32", "--skipInference"]
    for flag, value in (options or {}).items():
        check_known("flag of trtexec", flag, BUILD_FLAGS)
        if value is not False:
            words.append(f"--{flag}" if value is True else f"--{flag}={value}")
    for index, profile in enumerate(profiles):
        words.append(f"--profile={index}")
        for place, bound in enumerate(BOUNDS):
            words.append(f"--{bound}Shapes={_trtexec({name: shapes[place] for name, shapes in profile.items()})}")
    return shlex.join(words)


def trtexec_run(
    engine: Path, shapes: Mapping[str, Shape], inputs: Mapping[str, Path] | None = None, *, profile: int = 0
) -> str:
    """Return the command that times an engine at some shapes in one of its profiles.

    `inputs` are files of `save_binaries`; without them trtexec makes numbers up, and the ids may lie in no table.
    """
    words = ["trtexec", f"--loadEngine={engine}", f"--useProfile={profile}", f"--shapes={_trtexec(shapes)}"]
    if inputs:
        words.append(f"--loadInputs={','.join(f'{name}:{file}' for name, file in inputs.items())}")
    return shlex.join(words)


def polygraphy_run(
    model: Path,
    shapes: Mapping[str, Shape],
    inputs: Path,
    *,
    outputs: Path | None = None,
    profile: int = 0,
    cosine: float = 0.999,
) -> str:
    """Return the command that runs a graph (.onnx) or an engine in TensorRT and compares its outputs by cosine.

    They are compared with `outputs`, a file of `save_outputs`; without one, a graph's are compared with ONNX Runtime's,
    and an engine's are only run. `inputs` is a file of `save_inputs`, whose arrays have these shapes; an engine reads
    its own, a graph is built for them alone.
    """
    named = [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]
    words = ["polygraphy", "run", str(model), "--trt"]
    if model.suffix == ".onnx":
        words += ["--strongly-typed", "--decomposable-attentions"]
        for bound in BOUNDS:
            words += [f"--trt-{bound}-shapes", *named]
        words += ["--onnxrt"] if outputs is None else []
    else:
        words += ["--model-type", "engine", "--optimization-profile", str(profile)]
    words += ["--load-inputs", str(inputs)]
    if outputs is not None:
        words += ["--load-outputs", str(outputs)]
    if outputs is not None or model.suffix == ".onnx":
        words += ["--compare", "cosine_similarity", "--cosine-similarity-threshold", str(cosine)]
    return shlex.join(words)


def example_inputs(graph: GraphFacts, shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return inputs of these shapes that a graph can run: random floats and pixels, an empty cache, ids and places 0.

    A cache in bfloat16 is given as its bits, uint16, which trtexec reads and Polygraphy does not.
    """
    rng = np.random.default_rng(seed)
    return {tensor.name: _example(tensor, shapes[tensor.name], rng) for tensor in graph.inputs}


def _example(tensor: TensorFacts, shape: Shape, rng: np.random.Generator) -> NDArray[Any]:
    dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
    if tensor.name.startswith("past.") or dtype.kind == "i":
        return np.zeros(shape, dtype)
    if dtype.kind == "u":
        return rng.integers(0, 256, shape, dtype)
    return rng.standard_normal(shape).astype(dtype)


def save_inputs(path: Path, inputs: Arrays) -> None:
    """Write one run's inputs as `polygraphy run --load-inputs` reads them."""
    write_whole(path, json.dumps([{name: _array(array) for name, array in inputs.items()}]))


def save_outputs(path: Path, outputs: Arrays, runner: str) -> None:
    """Write one run's outputs as `polygraphy run --load-outputs` reads them; `runner` says what computed them."""
    values = {name: {"values": _array(array), "polygraphy_class": "LazyArray"} for name, array in outputs.items()}
    result = {"outputs": values, "runtime": None, "runner_name": runner, "polygraphy_class": "IterationResult"}
    write_whole(path, json.dumps({"lst": [[runner, [result]]], "polygraphy_class": "RunResults"}))


def save_binaries(folder: Path, inputs: Arrays) -> dict[str, Path]:
    """Write every input as the bare bytes that trtexec reads; return their files by the inputs' names."""
    files = {name: folder / f"{name}.bin" for name in inputs}
    for name, file in files.items():
        write_whole(file, np.ascontiguousarray(inputs[name]).tobytes())
    return files


def _array(array: NDArray[Any]) -> dict[str, str]:
    """Return an array in Polygraphy's JSON: numpy's own file format, in base 64."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return {"array": base64.b64encode(file.getvalue()).decode(), "polygraphy_class": "ndarray"}


def _trtexec(shapes: Mapping[str, Shape]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
