"""Command lines for trtexec and Polygraphy are those that these tools read, and Polygraphy reads the saved arrays.

Polygraphy parses its own; trtexec is nowhere here, so its words are held against how its parser pairs them.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from mmemb_deploy.backends.tensorrt.files import ProfileShapes
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts, TensorFacts
from mmemb_deploy.errors import OptionError
from mmemb_engines import tools
from mmemb_engines.profiles import demand_of_limits, profiles

GATE_SHAPES = {"state": (2, 48)}
PROFILES: list[ProfileShapes] = [
    {"token_ids": ((1, 1), (2, 256), (4, 512)), "past.0.key": ((1, 3, 8, 16), (2, 3, 8, 16), (4, 3, 8, 16))},
    {"token_ids": ((1, 1), (1, 1), (4, 1)), "past.0.key": ((1, 3, 8, 16), (1, 3, 8, 16), (4, 3, 8, 16))},
]

# Polygraphy looks for its plugins in a way that Python 3.11 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:SelectableGroups dict interface:DeprecationWarning")


def polygraphy(line: str) -> Any:
    """Return a line's options as Polygraphy reads and checks them; an unknown one fails."""
    tool = pytest.importorskip("polygraphy.tools.run.run", reason="Polygraphy is in the extra dev")
    parser = argparse.ArgumentParser()
    tool.Run().setup_parser(parser.add_subparsers())
    program, *words = shlex.split(line)
    assert program == "polygraphy"
    options = parser.parse_args(words)
    options.subcommand.parse(options)
    return options


def run(graph: Path, inputs: tools.Arrays) -> list[NDArray[Any]]:
    """Run a graph by ONNX Runtime; return all outputs."""
    session: Any = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, inputs)
    return outputs


def test_trtexec_builds_every_profile_strongly_typed() -> None:
    options: dict[str, str | int | bool] = {
        "saveEngine": "a folder/e.engine",
        "memPoolSize": "workspace:512",
        "refit": True,
        "stripWeights": False,
    }
    program, *words = shlex.split(tools.trtexec_build(Path("embedder.onnx"), PROFILES, options))
    assert program == "trtexec"
    assert words == [
        "--onnx=embedder.onnx",
        "--stronglyTyped",
        "--noTF32",
        "--skipInference",
        "--saveEngine=a folder/e.engine",
        "--memPoolSize=workspace:512",
        "--refit",
        "--profile=0",  # its parser takes the three words behind each
        "--minShapes=token_ids:1x1,past.0.key:1x3x8x16",
        "--optShapes=token_ids:2x256,past.0.key:2x3x8x16",
        "--maxShapes=token_ids:4x512,past.0.key:4x3x8x16",
        "--profile=1",
        "--minShapes=token_ids:1x1,past.0.key:1x3x8x16",
        "--optShapes=token_ids:1x1,past.0.key:1x3x8x16",
        "--maxShapes=token_ids:4x1,past.0.key:4x3x8x16",
    ]


def test_a_flag_that_trtexec_lacks_is_refused() -> None:
    with pytest.raises(OptionError, match="did you mean 'memPoolSize'"):
        tools.trtexec_build(Path("a.onnx"), [], {"memPool": "workspace:1"})


def test_trtexec_runs_a_profile_on_saved_bytes(tmp_path: Path) -> None:
    inputs = {"state": np.arange(96, dtype=np.float32).reshape(2, 48)}
    files = tools.save_binaries(tmp_path, inputs)
    line = tools.trtexec_run(Path("gate.engine"), GATE_SHAPES, files, profile=1)
    assert shlex.split(line) == [
        "trtexec",
        "--loadEngine=gate.engine",
        "--useProfile=1",
        "--shapes=state:2x48",
        f"--loadInputs=state:{files['state']}",
    ]
    np.testing.assert_array_equal(np.fromfile(files["state"], np.float32).reshape(2, 48), inputs["state"])


def test_polygraphy_compares_a_graph_with_onnx_runtime_by_cosine() -> None:
    options = polygraphy(tools.polygraphy_run(Path("gate.onnx"), GATE_SHAPES, Path("in.json")))
    assert (options.model_file, options.runners) == ("gate.onnx", ["trt", "onnxrt"])
    assert options.strongly_typed
    assert options.trt_min_shapes == options.trt_opt_shapes == options.trt_max_shapes == [["state:[2,48]"]]
    assert (options.load_inputs_paths, options.load_outputs_paths) == (["in.json"], [])
    assert (options.compare, options.cosine_similarity_threshold) == (["cosine_similarity"], ["0.999"])


def test_polygraphy_compares_an_engine_with_saved_outputs() -> None:
    line = tools.polygraphy_run(
        Path("a.engine"), GATE_SHAPES, Path("in.json"), outputs=Path("out.json"), profile=2, cosine=0.99
    )
    options = polygraphy(line)
    assert (options.model_type, options.runners, options.optimization_profile) == ("engine", ["trt"], 2)
    assert (options.load_outputs_paths, options.cosine_similarity_threshold) == (["out.json"], ["0.99"])


def test_polygraphy_reads_the_saved_arrays_and_sees_other_outputs(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.graph(abi.GATE)
    inputs = tools.example_inputs(bundle.manifest.graphs[abi.GATE], GATE_SHAPES)
    (scores,) = run(graph, inputs)
    tools.save_inputs(tmp_path / "in.json", inputs)
    tools.save_outputs(tmp_path / "same.json", {abi.SCORE: scores}, "reference")
    tools.save_outputs(tmp_path / "other.json", {abi.SCORE: -scores}, "reference")
    line = f"polygraphy run {graph} --onnxrt --compare cosine_similarity --load-inputs {tmp_path / 'in.json'}"
    same, other = (polygraphy(f"{line} --load-outputs {tmp_path / name}.json") for name in ("same", "other"))
    assert same.subcommand.run(same) == 0
    with pytest.raises(Exception, match="FAILED"):
        other.subcommand.run(other)


def test_every_graph_runs_on_its_example_inputs(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    for engine, (name, *_) in bundle.manifest.engines.items():
        box = profiles(engine, bundle.manifest, demand_of_limits(bundle.manifest, 2))[0]
        shapes = {tensor: smallest for tensor, (smallest, _, _) in box.items()}
        inputs = tools.example_inputs(bundle.manifest.graphs[name], shapes)
        assert all(np.isfinite(output).all() for output in run(bundle.graph(name), inputs)), name


def test_a_cache_in_bfloat16_is_given_as_its_bits() -> None:
    tensors = [("past.0.key", "bfloat16", ("rows", 4)), ("pixels", "uint8", (3,)), ("start", "int64", ("rows",))]
    inputs = tuple(TensorFacts(name=name, dtype=dtype, shape=shape) for name, dtype, shape in tensors)
    graph = GraphFacts(
        file="a.onnx", precision="bfloat16", form="portable", compute="bfloat16", inputs=inputs, outputs=()
    )
    made = tools.example_inputs(graph, {"past.0.key": (2, 4), "pixels": (3,), "start": (2,)})
    assert (made["past.0.key"].dtype.name, bool(made["past.0.key"].any())) == ("uint16", False)
    assert (made["pixels"].dtype.name, made["start"].tolist()) == ("uint8", [0, 0])
