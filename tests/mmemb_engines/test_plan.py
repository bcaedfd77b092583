"""A plan's figures are those of independent arithmetic, its limits are the last that fit, and it says what does not."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer
from onnx import TensorProto, helper
from typer.testing import CliRunner

from mmemb_deploy.backends.tensorrt.budget import Budget
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import read_manifest
from mmemb_deploy.bundle.work import graph_work
from mmemb_deploy.devices import DEVICES, GIB, find_device
from mmemb_deploy.errors import BackendError, BundleError, OptionError
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_engines.build import without_direct
from mmemb_engines.estimates import peak_bytes
from mmemb_engines.plan import make_plan
from mmemb_engines.plan_command import register
from mmemb_engines.profiles import demand_of_limits, profiles

# Of Qwen3-VL-2B's language model, as its config.json states them.
HIDDEN, LAYERS, HEADS, KV_HEADS, SIZE, INNER, WORDS = 2048, 28, 16, 8, 128, 6144, 151936


@pytest.fixture
def tiny(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle, read_manifest(tiny_bundle))


def changed(bundle: Bundle, **facts: Any) -> Bundle:
    """The bundle with other facts of every graph in its manifest."""
    graphs = {name: graph.model_copy(update=facts) for name, graph in bundle.manifest.graphs.items()}
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs}))


def decoder_of_2b() -> onnx.ModelProto:
    """A decoder in bfloat16 of which only the shapes are there: its weights lie in a file that does not exist."""
    held: list[TensorProto] = []

    def weight(name: str, *sides: int) -> str:
        held.append(TensorProto(name=name, dims=sides, data_type=TensorProto.BFLOAT16, data_location="EXTERNAL"))
        return name

    nodes = [helper.make_node("Gather", [weight("embed", WORDS, HIDDEN), "token_ids"], ["embedded"])]
    queries, keys = HEADS * SIZE, KV_HEADS * SIZE
    sides = {"q": (HIDDEN, queries), "k": (HIDDEN, keys), "v": (HIDDEN, keys), "o": (queries, HIDDEN)}
    sides |= {"gate": (HIDDEN, INNER), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
    shapes = []
    for layer in range(LAYERS):
        nodes += [helper.make_node("MatMul", ["x", weight(f"{layer}.{name}", *each)], [f"{layer}.{name}.out"])
                  for name, each in sides.items()]  # fmt: skip
        shapes.append(helper.make_tensor_value_info(f"{layer}.heads", 16, ["batch", HEADS, "tokens", SIZE]))
        nodes.append(helper.make_node("Attention", [f"{layer}.heads", "keys", "values"], [f"{layer}.attended"]))
    nodes.append(helper.make_node("Gemm", ["x", weight("head", WORDS, HIDDEN)], ["logits"], transB=1))
    graph = helper.make_graph(nodes, "decoder", [], [], held, value_info=shapes)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])


@pytest.fixture
def of_2b(tiny: Bundle, tmp_path: Path) -> Bundle:
    """A bundle of the 2B's size: its decoder as above, and the tiny bundle's vision and gate."""
    facts = tiny.manifest.model.model_copy(
        update={
            "hidden_size": HIDDEN,
            "layers": LAYERS,
            "kv_heads": KV_HEADS,
            "head_dim": SIZE,
            "vocabulary_size": WORDS,
            "max_rationale_tokens": 64,
        }
    )
    for name in (abi.VISION, abi.GATE):
        (tmp_path / tiny.manifest.graphs[name].file).write_bytes(tiny.graph(name).read_bytes())
    for name in (abi.DIRECT, abi.EMBEDDER):
        (tmp_path / tiny.manifest.graphs[name].file).write_bytes(decoder_of_2b().SerializeToString())
    bundle = Bundle(tmp_path, tiny.manifest.model_copy(update={"model": facts}))
    return changed(bundle, compute="bfloat16", precision="bfloat16")


def test_a_step_of_a_2b_model_reads_its_weights_in_a_millisecond_on_an_h100(of_2b: Bundle) -> None:
    layer = HIDDEN * SIZE * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    read = 2 * (LAYERS * layer + WORDS * HIDDEN)  # bytes: the token table is not read whole
    assert read == pytest.approx(3.44e9, rel=0.01)
    made = make_plan(of_2b, find_device("h100"), rows=1, tokens=256, rationale=0)
    cached = made.demand.slots * LAYERS * 2 * KV_HEADS * SIZE * 2
    step = made.times["step"]
    assert step.bound == "memory"
    assert step.least == pytest.approx((read + cached) / 3.35e12, rel=1e-3)
    assert step.expected == pytest.approx((read + cached) / 3.35e12 / 0.6, rel=1e-3)


def test_prompts_of_a_2b_model_take_two_operations_a_weight_and_token(of_2b: Bundle) -> None:
    rows, tokens = 32, 256
    made = make_plan(of_2b, find_device("l4"), rows=rows, tokens=tokens)
    layer = HIDDEN * SIZE * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    linear = 2 * rows * (tokens * LAYERS * layer + WORDS * HIDDEN)
    attention = 4 * rows * tokens * made.demand.slots * HEADS * SIZE * LAYERS  # scores and mixed values
    prompts = made.times["embedder"]
    assert made.runs == {"direct": 1, "embedder": 1}
    assert prompts.bound == "arithmetic"
    assert prompts.least == pytest.approx((linear + attention) / 121e12, rel=1e-3)
    assert prompts.expected == pytest.approx((linear + attention) / 121e12 / 0.35, rel=1e-3)
    causal = attention * (tokens + 1) / 2 / made.demand.slots
    assert made.times["direct"].least == pytest.approx((linear + causal) / 121e12, rel=1e-3)


def test_memory_is_weights_by_engine_and_slots_for_two_batches(of_2b: Bundle) -> None:
    made = make_plan(of_2b, find_device("h100"), rows=8, tokens=1000, rationale=64)
    tables = 2 * 2 * WORDS * HIDDEN
    layers = 2 * LAYERS * (HIDDEN * SIZE * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER)
    budget = made.budget
    assert budget.weights["decoder"] == budget.weights["direct"] == tables + layers  # embedder and generator are one
    assert budget.rows == 16
    assert budget.slots % 64 == 0
    assert 0 <= budget.slots - (1000 + 64 + PATH_MARKERS + 64) < 64  # a chunk may run beyond the rationale
    assert budget.cache == 16 * budget.slots * 114688  # 112 KiB a token
    assert budget.total == sum(budget.weights.values()) + budget.cache + budget.arena + budget.buffers + budget.features


def test_a_plan_without_direct_saves_its_weights(of_2b: Bundle) -> None:
    whole, less = (make_plan(bundle, find_device("h100"), rows=1) for bundle in (of_2b, without_direct(of_2b)))
    assert whole.budget.weights == {"direct": whole.budget.weights["decoder"], **less.budget.weights}
    assert less.times.keys() == {"embedder", "step", "image"}


def test_paths_of_two_precisions_are_two_engines(of_2b: Bundle) -> None:
    (of_2b.folder / "generator.onnx").write_bytes(of_2b.graph(abi.EMBEDDER).read_bytes())
    graphs = of_2b.manifest.graphs
    apart = graphs | {abi.GENERATOR: graphs[abi.GENERATOR].model_copy(update={"file": "generator.onnx"})}
    bundle = Bundle(of_2b.folder, of_2b.manifest.model_copy(update={"graphs": apart}))
    weights = make_plan(bundle, find_device("h100"), rows=1).budget.weights
    assert weights["generator"] == weights["decoder"]


def test_limits_are_the_last_that_fit(of_2b: Bundle) -> None:
    device = replace(find_device("rtx-4090"), memory_gib=16)
    made = make_plan(of_2b, device, rows=32)
    assert not made.fits
    assert made.verdict.startswith("does not fit: 32 inputs at once")
    assert f"--batch {made.most_rows}" in made.verdict
    assert 0 < made.most_rows < 32
    assert 0 < made.most_tokens < made.demand.tokens
    assert make_plan(of_2b, device, rows=made.most_rows).fits
    assert not make_plan(of_2b, device, rows=made.most_rows + 1).fits
    assert make_plan(of_2b, device, rows=32, tokens=made.most_tokens).fits
    assert not make_plan(of_2b, device, rows=32, tokens=made.most_tokens + 1).fits


def test_what_fits_in_no_way_says_so(of_2b: Bundle) -> None:
    made = make_plan(of_2b, replace(find_device("rtx-4060"), memory_gib=2), rows=1)
    assert (made.most_rows, made.most_tokens) == (0, 0)
    assert "smaller precision" in made.verdict


def test_a_device_that_shares_its_memory_keeps_some_for_the_system() -> None:
    nano, card = find_device("jetson-orin-nano"), find_device("rtx-4060")
    assert nano.memory_gib == card.memory_gib
    assert card.usable_bytes - nano.usable_bytes == 1.5 * GIB


def test_a_bundle_that_does_not_reason_has_neither_cache_nor_steps(tiny: Bundle) -> None:
    graphs = {name: tiny.manifest.graphs[name] for name in (abi.VISION, abi.DIRECT)}
    bundle = Bundle(tiny.folder, tiny.manifest.model_copy(update={"graphs": graphs}))
    made = make_plan(bundle, find_device("l4"), rows=4)
    assert made.budget.cache == 0
    assert set(made.times) == {"direct", "image"}
    assert "KV cache" in made.budget.figures()


@pytest.mark.parametrize(
    ("device", "facts", "fix"),
    [
        ("t4", {"compute": "bfloat16", "precision": "bfloat16"}, "--precision float16"),
        ("t4", {"compute": "bfloat16", "precision": "int8"}, "--compute float16"),
        ("t4", {"compute": "float16", "precision": "int4"}, "--precision int8"),
        ("a100-80", {"compute": "bfloat16", "precision": "fp8"}, "--precision int8"),
    ],
)
def test_a_precision_that_a_device_lacks_is_refused_with_the_fix(
    tiny: Bundle, device: str, facts: dict[str, str], fix: str
) -> None:
    with pytest.raises(OptionError, match=rf"which {device} \(sm\d+\) cannot multiply: .* {fix}"):
        make_plan(changed(tiny, **facts), find_device(device), rows=1)


def test_ampere_takes_bfloat16_and_ada_fp8() -> None:
    assert find_device("jetson-orin-nano").takes("bfloat16")
    assert find_device("l4").takes("fp8")
    assert not find_device("jetson-agx-orin").takes("fp8")


def test_a_peak_that_nobody_published_leaves_times_unknown(of_2b: Bundle) -> None:
    without = replace(find_device("jetson-thor"), tflops={"float32": 8.1})
    made = make_plan(of_2b, without, rows=1)
    assert made.times["embedder"].expected is None
    assert "not known" in made.times["embedder"].bound
    assert str(made.figures()["time"]["prompts that are kept, a second"]) == "not known"


def test_weights_of_four_bits_multiply_in_the_float_type(of_2b: Bundle) -> None:
    model = onnx.load(str(of_2b.graph(abi.EMBEDDER)), load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.data_type = TensorProto.INT4
    of_2b.graph(abi.EMBEDDER).write_bytes(model.SerializeToString())
    coarse, fine = changed(of_2b, precision="int4"), find_device("l4")
    work = graph_work(coarse, abi.EMBEDDER)
    assert set(work.token) == {"int4"}
    assert work.weight_bytes == pytest.approx(graph_work(coarse, abi.DIRECT).weight_bytes / 4)
    made = make_plan(coarse, fine, rows=32, tokens=256)
    assert made.times["embedder"].least == pytest.approx(
        make_plan(of_2b, fine, rows=32, tokens=256).times["embedder"].least
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "batch is 0: it must be at least 1"),
        ({"rows": 10**6}, "batch is 1000000: .* at most"),
        ({"rows": 1, "tokens": 0}, "tokens is 0: this bundle's prompts have 1 to"),
        ({"rows": 1, "rationale": -1}, "rationale is -1: it must be at least 0"),
        ({"rows": 1, "rationale": 1000}, "rationale is 1000: .* at most 9"),
    ],
)
def test_values_beyond_the_bundle_are_refused(tiny: Bundle, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_plan(tiny, find_device("l4"), **arguments)


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"device 'rtx4090' is not known: .*did you mean 'rtx-4090'"):
        find_device("rtx4090")
    with pytest.raises(OptionError, match="device 'cpu' is not known"):
        find_device("cpu")


def test_a_fused_bundle_is_refused(tiny: Bundle) -> None:
    with pytest.raises(BackendError, match="fused for ONNX Runtime"):
        make_plan(changed(tiny, form="fused"), find_device("l4"), rows=1)


def test_a_bundle_of_engines_alone_is_refused(tiny: Bundle) -> None:
    alone = Bundle(tiny.folder, tiny.manifest.model_copy(update={"engines_of": {}}))
    with pytest.raises(BackendError, match="holds engines without their graphs"):
        make_plan(alone, find_device("l4"), rows=1)


def test_attention_without_a_shape_is_refused(of_2b: Bundle) -> None:
    model = onnx.load(str(of_2b.graph(abi.EMBEDDER)), load_external_data=False)
    del model.graph.value_info[:]
    of_2b.graph(abi.EMBEDDER).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"does not say the shape of 0\.heads"):
        graph_work(of_2b, abi.EMBEDDER)


def test_every_device_is_named_with_its_source_and_a_peak_for_what_it_takes() -> None:
    for name, device in DEVICES.items():
        assert name == device.name
        assert device.source
        assert {"float32", "float16"} <= set(device.tflops)
        assert all(device.takes(precision) for precision in device.tflops)
        assert device.tflops["float32"] < device.tflops["float16"]


@pytest.fixture
def run(tiny_bundle: Path) -> Callable[..., str]:
    """Run `mmemb plan` on the tiny bundle; return what it prints."""
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)

    def run(*arguments: str) -> str:
        words = ["plan", str(tiny_bundle), *arguments]
        result = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "160"})
        assert result.exit_code == 0
        return result.output

    return run


def test_the_command_prints_the_plan_as_json(run: Callable[..., str], tiny: Bundle) -> None:
    made = json.loads(run("--device", "l4", "--batch", "2", "--tokens", "100", "--rationale", "5", "--json"))
    assert made["estimate"] is True
    assert made["fits"] is True
    assert (made["batch"], made["tokens"], made["rationale"]) == (2, 100, 5)
    assert made["device"]["target"] == "sm89"
    planned = make_plan(tiny, find_device("l4"), rows=2, tokens=100, rationale=5)
    assert made["figures"]["memory"]["all"]["value"] == planned.budget.total
    assert made["most_batch"] == planned.most_rows


def test_the_command_says_that_all_is_estimated(run: Callable[..., str]) -> None:
    shown = run("--device", "jetson-orin-nano", "--tokens", "100")
    assert "estimates" in shown
    assert "at the published peaks" in shown
    assert "fits: 32 inputs at once" in shown
    assert "nothing was run" in shown
    assert "Jetson Orin Nano" in shown


def test_a_budget_is_a_line_for_each_term() -> None:
    budget = Budget(weights={"decoder": GIB}, rows=2, slots=64, token_bytes=2**20, arena=GIB // 2)
    assert [line.split("  ")[0] for line in budget.lines()] == list(budget.figures())
    assert budget.lines()[0].split()[:5] == ["weights", "of", "decoder", "1.00", "GiB"]
    assert "2 rows x 64 slots x 1048576 B" in budget.lines()[1]
    assert budget.total == GIB + 128 * 2**20 + GIB // 2


ALLOTTED = """
import json, sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    said = []
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, _, message):
        self.said.append(message)

file, shapes = sys.argv[1], json.loads(sys.argv[2])
log = Log()
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
assert parser.parse_from_file(file)
for index in range(network.num_layers):
    layer = network.get_layer(index)
    if layer.type == trt.LayerType.ATTENTION_INPUT:
        layer.__class__ = trt.IAttentionInputLayer
        attention = layer.attention
        attention.decomposable = True
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
profile = builder.create_optimization_profile()
for name, shape in shapes.items():
    profile.set_shape(name, shape, shape, shape)
config.add_optimization_profile(profile)
assert builder.build_serialized_network(network, config)
print(*(message for message in log.said if message.startswith("Total Activation Memory")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [abi.DIRECT, abi.VISION])
def test_activations_are_about_what_the_library_allots(tiny: Bundle, name: str) -> None:
    """It says what it allots when it builds, to the first logger of a process."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'mmemb-deploy[rtx]'")
    (engine,) = (each for each, graphs in tiny.manifest.engines.items() if name in graphs)
    box = profiles(engine, tiny.manifest, replace(demand_of_limits(tiny.manifest, 4), tokens=512, patches=1024))[0]
    shapes = json.dumps({tensor: largest for tensor, (_, _, largest) in box.items()})
    command = [sys.executable, "-c", ALLOTTED, str(tiny.graph(name)), shapes]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (allotted,) = map(int, re.findall(r"Memory: (\d+)", said))
    assert allotted > 2**20
    assert peak_bytes(graph_work(tiny, name), tiny.manifest.graphs[name], box) == pytest.approx(allotted, rel=0.4)
