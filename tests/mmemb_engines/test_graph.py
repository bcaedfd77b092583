"""A graph that TensorRT is to read computes what the portable one does, and is built with its own attention.

The masked form runs on ONNX Runtime's CPU beside the portable one; both forms are built by TensorRT for RTX, which is
no run of TensorRT.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmemb_deploy.backends.tensorrt.api import Library
from mmemb_deploy.backends.tensorrt.network import Network
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError, OptionError
from mmemb_engines.by_hand import write_commands
from mmemb_engines.graph import prepared, write_prepared
from mmemb_engines.profiles import demand_of_limits, profiles
from mmemb_engines.watch import Silent

HEADS, KV_HEADS, SLOTS, SIZE = 4, 2, 16, 16
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a decoder of one layer: keys and values into slots, then attention; its weights in a file of their own."""

    def tensor(name: str, dtype: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, dtype, shape)

    def write(dtype: int = TensorProto.FLOAT, size: int = SIZE, *, causal: int = 1) -> Path:
        new, past = ("batch", KV_HEADS, "tokens", size), ("batch", KV_HEADS, "slots", size)
        queries = "batch", HEADS, "tokens", size
        inputs = [
            *(tensor(name, dtype, *shape) for name, shape in {"queries": queries, "keys": new, "values": new}.items()),
            *(tensor(f"past.{name}", dtype, *past) for name in ("keys", "values")),
            tensor("start", TensorProto.INT64, "batch"),
            tensor(abi.TOKEN_IDS, TensorProto.INT64, "batch", "tokens"),
        ]
        outputs = [tensor("mixed", dtype, *queries)]
        outputs += [tensor(f"present.{name}", dtype, *past) for name in ("keys", "values")]
        attended = ["weighted", "present.keys", "present.values", "", "", "", "ends"]
        nodes = [
            helper.make_node("Mul", ["queries", "weight"], ["weighted"]),
            helper.make_node("TensorScatter", ["past.keys", "keys", "start"], ["present.keys"], axis=2),
            helper.make_node("TensorScatter", ["past.values", "values", "start"], ["present.values"], axis=2),
            helper.make_node("Shape", [abi.TOKEN_IDS], ["new"], start=1),
            helper.make_node("Add", ["start", "new"], ["ends"]),
            helper.make_node("Attention", attended, ["mixed"], is_causal=causal, scale=0.3),
        ]
        weight = np.linspace(0.5, 1.5, size, dtype=np.float32).astype(helper.tensor_dtype_to_np_dtype(dtype))
        graph = helper.make_graph(nodes, "decoder", inputs, outputs, [numpy_helper.from_array(weight, "weight")])
        opsets = [helper.make_opsetid("", 24)]
        path = tmp_path / "decoder.onnx"
        onnx.save(
            helper.make_model(graph, opset_imports=opsets, ir_version=11),
            path,
            save_as_external_data=True,
            location="decoder.onnx.data",
            size_threshold=0,
        )
        return path

    return write


def run(model: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("window", [10, SLOTS])
def test_a_mask_over_a_window_is_equal_to_lengths_for_rows_of_any_start(
    make: Make, tmp_path: Path, tokens: int, window: int
) -> None:
    path = make()
    masked = write_prepared(path, prepared(path, SLOTS, lengths=False), ["decoder.onnx.data"], tmp_path / "masked")
    rng = np.random.default_rng(0)

    def random(heads: int, length: int) -> Any:
        return rng.standard_normal((4, heads, length, SIZE), dtype=np.float32)

    feeds = {
        abi.TOKEN_IDS: np.zeros((4, tokens), np.int64),
        "queries": random(HEADS, tokens),
        "keys": random(KV_HEADS, tokens),
        "values": random(KV_HEADS, tokens),
        "past.keys": random(KV_HEADS, SLOTS),
        "past.values": random(KV_HEADS, SLOTS),
        "start": np.array([0, 1, 6, window - tokens]),
    }
    seen = {abi.WINDOW: np.arange(window)}
    ours, theirs = run(masked, feeds | seen), run(path, feeds)
    for name, array in theirs.items():
        assert np.allclose(ours[name], array, atol=1e-6), name
    feeds["past.values"][:, :, window - 1 :] += 100  # slots that only the last row sees, and only once it has written
    assert np.array_equal(run(masked, feeds | seen)["mixed"], ours["mixed"])


def test_slots_are_fixed_wherever_the_axis_is_named(make: Make) -> None:
    model = onnx.load_from_string(prepared(make(), 48, lengths=True).model)
    shapes = {
        value.name: [axis.dim_value or axis.dim_param for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["past.keys"] == shapes["present.values"] == ["batch", KV_HEADS, 48, SIZE]
    assert shapes["mixed"] == ["batch", HEADS, "tokens", SIZE]
    assert not model.graph.initializer[0].raw_data  # the weights stay where they are


def test_lengths_are_named_where_no_mask_takes_their_place(make: Make) -> None:
    path = make()
    assert prepared(path, SLOTS, lengths=True).lengths == "ends"
    assert prepared(path, SLOTS, lengths=False).lengths is None


def test_attention_that_is_told_lengths_and_is_not_causal_is_refused(make: Make) -> None:
    with pytest.raises(BackendError, match=r"decoder.onnx has attention over slots that is not causal"):
        prepared(make(causal=0), SLOTS, lengths=False)


def box(rows: int, tokens: int, size: int) -> dict[str, Any]:
    """Return a profile of up to so many rows and tokens."""

    def range_of(heads: int, length: int | None) -> Any:
        return tuple((each, heads, length or most, size) for each, most in ((1, 1), (rows, tokens), (rows, tokens)))

    new, past = range_of(KV_HEADS, None), range_of(KV_HEADS, SLOTS)
    rows_alone = (1,), (rows,), (rows,)
    return {
        "queries": range_of(HEADS, None),
        "keys": new,
        "values": new,
        "past.keys": past,
        "past.values": past,
        "start": rows_alone,
        abi.TOKEN_IDS: tuple((each, length) for each, length in ((1, 1), (rows, tokens), (rows, tokens))),
        abi.WINDOW: ((4,), (SLOTS,), (SLOTS,)),
    }


def build(rtx: Library, path: Path, size: int, *, lengths: bool) -> Any:
    graph = prepared(path, SLOTS, lengths=lengths)
    network = Network(rtx, path, graph.model, lengths=graph.lengths)
    boxes = [box(4, 1, size), box(2, 8, size)]
    return network.build(boxes, BuildOptions(), target="sm89", timings=b"", watcher=Silent())


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("dtype", [TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT])
def test_both_forms_are_built_with_weights_from_their_file(make: Make, rtx: Library, dtype: int, lengths: bool) -> None:
    plan = build(rtx, make(dtype), SIZE, lengths=lengths)
    assert plan.content.nbytes > 0
    assert not plan.decomposed


def test_lengths_that_the_parser_drops_are_set_again(make: Make, rtx: Library) -> None:
    """An engine of a graph whose lengths nobody set is the size of one that never had any."""
    path = make(TensorProto.FLOAT16)
    told = build(rtx, path, SIZE, lengths=True).content.nbytes
    graph = prepared(path, SLOTS, lengths=True)
    never = onnx.load_from_string(graph.model)
    del never.graph.node[-1].input[3:]
    dropped, untold = (
        Network(rtx, path, model)
        .build([box(4, 1, SIZE), box(2, 8, SIZE)], BuildOptions(), target="sm89", timings=b"", watcher=Silent())
        .content.nbytes
        for model in (graph.model, never.SerializeToString())
    )
    assert abs(dropped - untold) < 1000
    assert told > dropped + 100_000


def test_half_precision_without_a_kernel_is_written_out_and_says_so(make: Make, rtx: Library) -> None:
    plan = build(rtx, make(TensorProto.FLOAT16, 8), 8, lengths=False)
    assert plan.decomposed


def test_a_decoders_graph_is_masked_once_for_all_layers(bundle: Bundle) -> None:
    model = onnx.load_from_string(prepared(bundle.graph(abi.EMBEDDER), 64, lengths=False).model)
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(attentions) == bundle.manifest.model.layers
    assert {node.input[3] for node in attentions} == {"slots.mask"}
    assert sum(node.op_type == "Less" for node in model.graph.node) == 1


def test_a_graph_without_a_cache_is_as_it_was(bundle: Bundle) -> None:
    path = bundle.graph(abi.DIRECT)
    found = prepared(path, None, lengths=False)
    assert found.lengths is None
    assert onnx.load_from_string(found.model) == onnx.load(str(path), load_external_data=False)


def test_the_commands_of_a_build_by_hand_name_graphs_that_parse(bundle: Bundle, rtx: Library, tmp_path: Path) -> None:
    folder, demand = tmp_path / "by hand", demand_of_limits(bundle.manifest, 2)
    options = BuildOptions(optimization_level=4, version_compatible=True)
    commands = [shlex.split(command) for command in write_commands(bundle, demand, options, folder)]
    builds = {words[1].removeprefix("--onnx="): words for words in commands if words[1].startswith("--onnx=")}
    assert [Path(path).stem for path in builds] == list(bundle.manifest.engines)
    for path, words in builds.items():
        assert {"--builderOptimizationLevel=4", "--versionCompatible", "--decomposableAttentions=*"} <= set(words)
        boxes = profiles(Path(path).stem, bundle.manifest, demand)
        assert sum(word.startswith("--maxShapes=") for word in words) == len(boxes)
        runs = [each for each in commands if f"--loadEngine={folder / Path(path).stem}.engine" in each]
        assert len(runs) == len(boxes)
        Network(rtx, Path(path))
    with pytest.raises(OptionError, match="attention is 'lengths': trtexec can only build graphs that mask"):
        next(write_commands(bundle, demand, BuildOptions(attention="lengths"), folder))
