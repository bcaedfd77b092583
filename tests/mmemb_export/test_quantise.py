"""Linear layers in fewer bits: integers that every CPU multiplies exactly, and graphs that compute what is said."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.precision import FLOATS
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.activations import ranges, sensitivity
from mmemb_export.integers import Int4, Int8
from mmemb_export.layers import Quantiser
from mmemb_export.probes import synthetic_probes
from mmemb_export.quantise import quantise, quantiser
from mmemb_export.recipe import FORMS, Recipe
from mmemb_export.traced import Choices, TracedGraphs
from mmemb_export.weights import CheckpointWeights
from mmemb_export.write import export_bundle
from mmemb_training.checkpoint import Checkpoint, load_checkpoint, outline_checkpoint

NANO = [(128, 384), (384, 128), (96, 288), (128, 494)]
REAL = [(1024, 3072), (6144, 96), (1153, 520), (1, 3)]  # of 0.2B and 2B, and odd numbers of input channels


def weights(shape: tuple[int, int]) -> dict[str, Floats]:
    """Weights (K, N) of several distributions; with all of one size, every pair is as large as it may be."""
    rng = np.random.default_rng(0)
    found = {
        "normal": rng.normal(size=shape),
        "heavy-tailed": rng.standard_t(3, size=shape),
        "all of one sign": np.abs(rng.normal(size=shape)),
        "all of one size": np.where(np.arange(shape[1]) % 2, 1.0, -1.0) * np.ones(shape),
        "all zero": np.zeros(shape),
    }
    return {name: weight.astype(np.float32) for name, weight in found.items()}


def activations(values_KN: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Rows (8, K) of uint8: the ends of the range, mixtures of them, and what makes the pairs of a channel largest."""
    rng = np.random.default_rng(1)
    inputs = len(values_KN)
    busiest_K = values_KN[:, np.abs(values_KN.astype(int)).sum(axis=0).argmax()]
    rows = [
        np.full(inputs, 255),
        np.full(inputs, 1),
        np.where(np.arange(inputs) % 2, 255, 1),
        np.where(np.arange(inputs) // 2 % 2, 255, 1),
        np.where(busiest_K > 0, 255, 1),
        np.where(busiest_K < 0, 255, 1),
        rng.choice([1, 255], size=inputs),
        rng.integers(1, 256, size=inputs),
    ]
    return np.stack(rows).astype(np.uint8)


def integer_product(values_KN: NDArray[np.int8]) -> onnxruntime.InferenceSession:
    """Return ONNX Runtime's own product of uint8, 128 standing for 0, and these weights, before any scale."""
    inputs, outputs = values_KN.shape
    held = [
        helper.make_tensor("values", TensorProto.INT8, values_KN.shape, values_KN.tobytes(), raw=True),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("scales", TensorProto.FLOAT, [outputs], np.ones(outputs, np.float32)),
        helper.make_tensor("middle", TensorProto.UINT8, [], [128]),
    ]
    names = ["states", "values", "one", "scales", "middle"]
    graph = helper.make_graph(
        [helper.make_node("MatMulIntegerToFloat", names, ["product"], domain="com.microsoft")],
        "product",
        [helper.make_tensor_value_info("states", TensorProto.UINT8, ["rows", inputs])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, ["rows", outputs])],
        held,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, states_RK: NDArray[Any]) -> Any:
    return session.run(None, {"states": states_RK})[0]


@pytest.mark.parametrize("shape", NANO + REAL)
def test_int8_products_are_exact_on_every_cpu_whatever_the_activations(shape: tuple[int, int]) -> None:
    for name, weight_KN in weights(shape).items():
        values_KN, _ = Int8().weight(weight_KN)
        session, states_RK = integer_product(values_KN), activations(values_KN)
        # float64 holds these sums exactly, and float32 is what the operator makes of its own
        exact_RN = ((states_RK.astype(np.float64) - 128) @ values_KN.astype(np.float64)).astype(np.float32)
        for row in range(len(states_RK)):
            np.testing.assert_array_equal(run(session, states_RK[row : row + 1]), exact_RN[row : row + 1], name)
        np.testing.assert_array_equal(run(session, states_RK), exact_RN, name)
        np.testing.assert_array_equal(run(session, np.tile(states_RK, (32, 1))), np.tile(exact_RN, (32, 1)), name)


@pytest.mark.parametrize("shape", NANO + REAL)
def test_two_neighbouring_int8_weights_never_exceed_16_bits_together(shape: tuple[int, int]) -> None:
    for name, weight_KN in weights(shape).items():
        values_KN = Int8().weight(weight_KN)[0].astype(int)
        paired = values_KN[: len(values_KN) // 2 * 2].reshape(-1, 2, shape[1]).sum(axis=1)
        assert np.abs(values_KN).max() <= 127, name
        assert np.abs(paired).max(initial=0) * 255 <= np.iinfo(np.int16).max, name


@pytest.mark.parametrize(("name", "more"), [("normal", 1.35), ("heavy-tailed", 1.05), ("all of one size", 1.0)])
def test_int8_in_pairs_loses_little_more_than_int8_that_overflows(name: str, more: float) -> None:
    weight_KN = weights((1024, 512))[name]

    plain = quantiser("portable", "int8", "float32", {})

    def error(values_KN: NDArray[np.int8], scale_N: Floats) -> float:
        return float(np.linalg.norm(values_KN * scale_N - weight_KN))

    assert error(*Int8().weight(weight_KN)) <= more * error(*plain.weight(weight_KN)) + 1e-3


def test_int4_is_off_by_half_a_step_at_most_but_for_the_far_end() -> None:
    weight_KN = np.random.default_rng(0).normal(size=(70, 10)).astype(np.float32)
    packed_NGS, scale_NG = Int4().weight(weight_KN)
    values_NGS = np.stack([packed_NGS & 15, packed_NGS >> 4], axis=-1).reshape(10, 3, 32).astype(np.float32) - 8
    coarse_KN = (values_NGS * scale_NG.reshape(10, 3, 1)).reshape(10, -1)[:, :70].T
    steps_KN = np.repeat(np.abs(scale_NG).reshape(10, 3), 32, axis=1)[:, :70].T
    assert (np.abs(coarse_KN - weight_KN) <= steps_KN * 1.01).all()
    assert np.mean(np.abs(coarse_KN - weight_KN) <= steps_KN * 0.501) > 0.97


@pytest.mark.parametrize("floats", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("precision", "block"), [("int8", 128), ("int4", 64)])
def test_portable_values_are_off_by_half_a_step_of_the_scale_that_is_stored(
    precision: str, block: int, floats: str
) -> None:
    weight_KN = np.random.default_rng(0).normal(size=(128, 10)).astype(np.float32) * np.float32(1e-3)
    weight_KN[:, 3] = 0
    values_KN, scales = quantiser("portable", precision, floats, {}).weight(weight_KN)
    np.testing.assert_array_equal(scales, scales.astype(floats).astype(np.float32))
    steps_KN = np.broadcast_to(scales.reshape(-1, 1, 10), (128 // block, block, 10)).reshape(128, 10)
    assert (np.abs(values_KN.astype(np.float32) * steps_KN - weight_KN) <= steps_KN * 0.5001).all()


LAYERS = [(form, precision) for form, known in FORMS.items() for precision in known if precision not in FLOATS]


UNEVEN = (
    112,
    72,
)  # input channels, of `uneven_checkpoint` too, that are no multiple of 32 or 64, as 4304 in the vision encoder of 8B


def written_layer(
    form: str, precision: str, inputs: int
) -> tuple[Quantiser, ir.Model, NDArray[np.float32], NDArray[np.float32]]:
    """A quantiser, the layer that it wrote, and the weight (K, N) and some input (R, K) of the layer."""
    rng = np.random.default_rng(0)
    weight_KN = rng.standard_t(4, size=(inputs, 40)).astype(np.float32)
    states_RK = rng.standard_t(4, size=(30, inputs)).astype(np.float32)
    chosen = quantiser(form, precision, "float32", {"layer.weight": float(np.abs(states_RK).max()) / 2})
    held = [helper.make_tensor("layer.weight.T", TensorProto.FLOAT, weight_KN.shape, weight_KN)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["states", "layer.weight.T"], ["product"])],
        "layer",
        [helper.make_tensor_value_info("states", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, ["rows", 40])],
        held,
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    return chosen, quantise(model, chosen), weight_KN, states_RK


@pytest.mark.parametrize(
    ("form", "precision", "inputs"),
    [(*layer, 192) for layer in LAYERS]
    + [(*layer, inputs) for layer in LAYERS if layer != ("portable", "int4") for inputs in UNEVEN],
)
def test_a_written_layer_computes_what_its_quantiser_says(form: str, precision: str, inputs: int) -> None:
    chosen, written, weight_KN, states_RK = written_layer(form, precision, inputs)
    assert "layer.weight.T" not in written.graph.initializers
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graph as it is written
    model = ir.to_proto(written).SerializeToString()
    found_RN = run(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]), states_RK)
    said_RN = chosen.product(states_RK, chosen.weight(weight_KN), "layer.weight")
    size = np.linalg.norm(found_RN)
    assert np.linalg.norm(said_RN - found_RN) <= 1e-5 * size
    assert np.linalg.norm(states_RK @ weight_KN - found_RN) >= 1e-3 * size


@pytest.mark.parametrize("inputs", UNEVEN)
def test_portable_int4_leaves_a_layer_that_its_blocks_do_not_fill(inputs: int) -> None:
    _, written, _, _ = written_layer("portable", "int4", inputs)
    assert [node.op_type for node in written.graph] == ["MatMul"]
    assert "layer.weight.T" in written.graph.initializers


@pytest.fixture(scope="module")
def errors(tiny_checkpoint: Path) -> dict[tuple[str, str], dict[str, float]]:
    """What every quantiser loses in every layer of the tiny checkpoint."""
    checkpoint, probes = load_checkpoint(tiny_checkpoint), synthetic_probes(4)
    measured = ranges(checkpoint, probes)
    return {
        (form, precision): sensitivity(checkpoint, probes, quantiser(form, precision, "float32", measured))
        for form, precision in LAYERS
    }


def test_every_layer_that_can_be_quantised_is_ranked_and_the_worst_comes_first(
    errors: dict[tuple[str, str], dict[str, float]], tiny_checkpoint: Path
) -> None:
    model = load_checkpoint(tiny_checkpoint).model
    inputs = {
        f"{name.removeprefix('model.')}.weight": layer.in_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    for (form, precision), found in errors.items():
        taken = {name for name, count in inputs.items() if (form, precision) != ("portable", "int4") or count % 64 == 0}
        assert found.keys() == taken
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert 0 < len(errors["portable", "int4"]) < len(inputs)


def test_a_layer_is_ranked_by_what_its_own_form_and_precision_lose(
    errors: dict[tuple[str, str], dict[str, float]],
) -> None:
    names = errors["portable", "int4"]
    for form in ("fused", "portable"):
        assert all(0 < errors[form, "int8"][name] < errors[form, "int4"][name] for name in names)
    assert all(errors["portable", "fp8"][name] < errors["portable", "int4"][name] / 2 for name in names)
    fused, portable = (errors[form, "int4"] for form in ("fused", "portable"))  # blocks of 32, and of 64
    assert all(fused[name] < portable[name] for name in names)
    # one scale for all tokens loses more than one for each
    assert np.mean([errors["portable", "int8"][name] > error for name, error in errors["fused", "int8"].items()]) > 0.9


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_weight_is_read_once(precision: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    outline = outline_checkpoint(tiny_checkpoint)
    weights = CheckpointWeights(tiny_checkpoint, outline)
    reads = Counter[str]()

    def counted(name: str) -> torch.Tensor:
        reads[name] += 1
        return weights(name)

    TracedGraphs(outline, counted, Recipe(form="fused", precision=precision)).write(tmp_path, Choices())
    assert {"language_model.layers.0.mlp.down_proj.weight", "lm_head.weight", "visual.pos_embed.weight"} <= reads.keys()
    assert set(reads.values()) == {1}


def tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The initializers of a graph, with their values."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def ones(outline: Checkpoint) -> dict[str, float]:
    """A range for the input of every layer."""
    return {f"{name.removeprefix('model.')}.weight": 1.0 for name, _ in outline.model.named_modules()}


@pytest.mark.parametrize(
    ("form", "precision", "generator"),
    [("fused", "int8", "int4"), ("portable", "int8", "int4"), ("portable", "fp8", "fp8"), ("portable", "int4", "int4")],
)
def test_what_a_graph_holds_in_the_float_type_is_listed_and_reported(
    form: str, precision: str, generator: str, uneven_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = Recipe(form=form, precision=precision, generator_precision=generator, compute="float32")
    outline, said = outline_checkpoint(uneven_checkpoint), list[str]()
    graphs = TracedGraphs(outline, CheckpointWeights(uneven_checkpoint, outline), recipe, said.append)
    facts = graphs.write(tmp_path, Choices(ranges=ones(outline), kept=("lm_head.weight",)))
    for name, each in facts.items():
        held = {
            name.removesuffix(".T")
            for name, values in tensors(tmp_path / each.file).items()
            if values.ndim > 1 and values.dtype == np.float32 and not name.endswith("_scale")
        }
        assert set(each.kept) == (held if name != abi.GATE else set())
        assert not each.kept or f"{name} keeps in float32: {', '.join(each.kept)}" in said
    down, up = (f"language_model.layers.0.mlp.{name}_proj.weight" for name in ("down", "up"))
    vision = {f"visual.blocks.0.mlp.linear_fc{layer}.weight" for layer in (1, 2)}
    listed = {name: set(each.kept) for name, each in facts.items()}
    int4 = {name for name, each in facts.items() if (form, each.precision) == ("portable", "int4")}
    for name in (abi.EMBEDDER, abi.GENERATOR):
        assert listed[name] & {down, up} == ({down} if name in int4 else set())
    assert listed[abi.VISION] & vision == ({"visual.blocks.0.mlp.linear_fc2.weight"} if abi.VISION in int4 else set())
    assert "visual.patch_embed.proj.weight" in listed[abi.VISION]
    assert "lm_head.weight" in listed[abi.GENERATOR]
    assert ("language_model.embed_tokens.weight" in listed[abi.EMBEDDER]) == (form == "portable")


def test_a_coarser_generator_beside_half_precision_is_certified_by_a_twin_with_its_weights_integers_and_scales(
    uneven_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generators: dict[str, dict[str, NDArray[Any]]] = {}
    write_once = TracedGraphs.write

    def written(self: TracedGraphs, folder: Path, choices: Choices) -> Any:
        facts = write_once(self, folder, choices)
        generators[folder.name] = tensors(folder / facts[abi.GENERATOR].file)
        return facts

    monkeypatch.setattr(TracedGraphs, "write", written)
    recipe = Recipe(
        precision="bfloat16", generator_precision="int8", min_cosine=0.5, max_flips=1, min_token_agreement=0
    )
    manifest = export_bundle(uneven_checkpoint, tmp_path / "made", recipe=recipe, probes=4, report=lambda _: None)
    precisions = [manifest.graphs[name].precision for name in (abi.EMBEDDER, abi.GENERATOR)]
    assert precisions == ["bfloat16", "int8"]
    ours, twin = generators["bundle"], generators["twin"]
    weights = [name for name in twin if "weight" in name]
    for name in weights:
        np.testing.assert_array_equal(twin[name].astype(np.float32), ours[name].astype(np.float32), name)
    assert {ours[name].dtype.name for name in weights} == {"int8", "bfloat16"}
    assert {twin[name].dtype.name for name in weights} == {"int8", "float32"}
