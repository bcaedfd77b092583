"""Every graph of a bundle parses and builds with TensorRT for RTX, without a GPU.

This is a check of graphs and of the build's own work. It is no run of TensorRT.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer
from typer.testing import CliRunner

from mmemb_deploy.backends.tensorrt.api import TENSORRT, TENSORRT_RTX, Library, Network, Watcher
from mmemb_deploy.backends.tensorrt.files import ENGINES, EngineSet, find_set, read_engine, read_sets, write_set
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts, TensorFacts
from mmemb_deploy.errors import BackendError, OptionError
from mmemb_engines.build import build_engines, check_portable, device_sets
from mmemb_engines.check import check_graphs
from mmemb_engines.commands import register
from mmemb_engines.profiles import demand_of_limits, profiles
from mmemb_engines.watch import Silent

TARGETS = ("sm80", "sm86", "sm89", "sm120")  # of those with float32 matrix products: all that it knows but Turing


def silent(_: str) -> Watcher:
    return Silent()


@pytest.fixture
def build(bundle: Bundle, rtx: Library) -> Callable[[], EngineSet]:
    """Build the bundle for one target, in batches of 2."""
    demand = demand_of_limits(bundle.manifest, 2)
    (device,) = device_sets(bundle, TENSORRT_RTX, ("sm89",))[1]
    return lambda: build_engines(bundle, rtx, device, demand, silent)


def files(bundle: Bundle) -> dict[str, int]:
    """Map every file below the engines' folder to the time it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (bundle.folder / ENGINES).rglob("*") if path.is_file()}


def test_every_graph_parses_and_builds_for_every_target(bundle: Bundle, rtx: Library) -> None:
    demand = demand_of_limits(bundle.manifest, 32)
    _, devices = device_sets(bundle, TENSORRT_RTX, TARGETS)
    rows = list(check_graphs(bundle, rtx, devices, demand, silent))
    assert [(row.target, row.graph) for row in rows] == [(target, name) for target in TARGETS for name in abi.GRAPHS]
    assert [row.error for row in rows if not (row.parsed and row.built)] == []
    assert all(row.size > 0 for row in rows)


def test_engines_are_listed_with_all_they_depend_on(bundle: Bundle, build: Callable[[], EngineSet]) -> None:
    built = build()
    assert list(read_sets(bundle)) == [built]
    assert built.certificate is None
    assert built.folder.startswith("tensorrt-rtx-sm89-1.")
    assert set(built.engines) == set(abi.GRAPHS)
    for name, engine in built.engines.items():
        assert engine.size == len(read_engine(bundle, built, name))
        assert engine.profiles == profiles(name, bundle.manifest, demand_of_limits(bundle.manifest, 2))
    assert find_set(bundle, built) == built
    Bundle.open(bundle.folder)  # the bundle's own files are as they were


def test_engines_whose_key_has_not_changed_are_kept(bundle: Bundle, build: Callable[[], EngineSet]) -> None:
    built = build()
    before = files(bundle)
    assert build() == built
    assert files(bundle) == before


def test_only_what_has_changed_is_built_again(bundle: Bundle, build: Callable[[], EngineSet], rtx: Library) -> None:
    built = build()
    before = files(bundle)
    write_set(bundle, built.model_copy(update={"certificate": bundle.manifest.certificate}))
    (device,) = device_sets(bundle, TENSORRT_RTX, ("sm89",))[1]
    changed = bundle.manifest.files | {"gate.onnx": "0" * 64}
    other = Bundle(bundle.folder, bundle.manifest.model_copy(update={"files": changed}))
    again = build_engines(other, rtx, device, demand_of_limits(bundle.manifest, 2), silent)
    assert {name for name in abi.GRAPHS if again.engines[name] != built.engines[name]} == {abi.GATE}
    assert again.certificate is None  # it was measured on another gate
    after = files(bundle)
    assert built.engines[abi.GATE].file not in after
    kept = {built.engines[name].file for name in (abi.VISION, abi.EMBEDDER, abi.GENERATOR)}
    assert all(after[name] == before[name] for name in kept)


def test_other_profiles_are_other_engines(bundle: Bundle, build: Callable[[], EngineSet], rtx: Library) -> None:
    built = build()
    (device,) = device_sets(bundle, TENSORRT_RTX, ("sm89",))[1]
    again = build_engines(bundle, rtx, device, demand_of_limits(bundle.manifest, 3), silent)
    assert not {each.key for each in again.engines.values()} & {each.key for each in built.engines.values()}


def test_a_changed_engine_is_built_again(bundle: Bundle, build: Callable[[], EngineSet]) -> None:
    built = build()
    path = bundle.folder / ENGINES / built.folder / built.engines[abi.GATE].file
    path.write_bytes(b"half an engine")
    build()
    read_engine(bundle, next(read_sets(bundle)), abi.GATE)


class Impatient(Silent):
    """Interrupts a build at its third step, as Ctrl-C does."""

    def __init__(self) -> None:
        self.steps = 0

    def stepped(self, phase: str, step: int) -> None:
        del phase, step
        self.steps += 1
        if self.steps == 3:
            raise KeyboardInterrupt


def test_an_interrupted_build_keeps_what_was_finished(bundle: Bundle, rtx: Library) -> None:
    """The library must not see the exception, which would end the process."""
    (device,) = device_sets(bundle, TENSORRT_RTX, ("sm89",))[1]
    demand = demand_of_limits(bundle.manifest, 2)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, rtx, device, demand, lambda name: Impatient() if name == abi.EMBEDDER else Silent())
    (found,) = read_sets(bundle)
    assert set(found.engines) == {abi.VISION}
    read_engine(bundle, found, abi.VISION)
    assert not [name for name in files(bundle) if name.startswith(".")]
    before = files(bundle)[found.engines[abi.VISION].file]
    finished = build_engines(bundle, rtx, device, demand, silent)
    assert set(finished.engines) == set(abi.GRAPHS)
    assert files(bundle)[found.engines[abi.VISION].file] == before


def test_phases_are_told_in_order_and_all_end(bundle: Bundle, rtx: Library) -> None:
    told: list[tuple[str, str]] = []

    class Notes(Silent):
        def started(self, phase: str, parent: str | None, steps: int) -> None:
            told.append(("started", phase))
            assert steps >= 1
            assert parent is None or ("started", parent) in told

        def finished(self, phase: str) -> None:
            told.append(("finished", phase))

    boxes = profiles(abi.GATE, bundle.manifest, demand_of_limits(bundle.manifest, 2))
    Network(rtx, bundle.graph(abi.GATE)).build(boxes, target="sm89", timings=b"", watcher=Notes())
    assert told[0] == ("started", "Building engine")
    assert told[-1] == ("finished", "Building engine")
    assert sorted(phase for kind, phase in told if kind == "started") == sorted(
        phase for kind, phase in told if kind == "finished"
    )


def test_an_operator_that_the_parser_does_not_know_is_named(tmp_path: Path, rtx: Library) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    node = onnx.helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft")
    graph = onnx.helper.make_graph([node], "one", [value], [out])
    opset = onnx.helper.make_opsetid("com.microsoft", 1)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset]), tmp_path / "g")
    with pytest.raises(BackendError, match=r"tensorrt-rtx 1.* cannot parse g: MatMulNBits: "):
        Network(rtx, tmp_path / "g")


def test_a_profile_that_the_library_refuses_is_an_error(bundle: Bundle, rtx: Library) -> None:
    hidden = bundle.manifest.model.hidden_size
    backwards = {abi.STATE: ((4, hidden), (2, hidden), (1, hidden))}
    with pytest.raises(BackendError, match=r"profile .*gate.onnx"):
        Network(rtx, bundle.graph(abi.GATE)).build([backwards], target="sm89", timings=b"", watcher=Silent())


def test_targets_are_for_the_library_that_can_build_ahead_of_time(bundle: Bundle, rtx: Library) -> None:
    with pytest.raises(OptionError, match="TensorRT builds for the GPU that it runs on"):
        device_sets(bundle, TENSORRT, ("sm89",))
    with pytest.raises(OptionError, match=r"target 'sm90' is not known: choose from .*sm89"):
        device_sets(bundle, TENSORRT_RTX, ("sm90",))
    assert rtx.version.startswith("1.")


@pytest.mark.no_gpu
@pytest.mark.parametrize("library", [TENSORRT, TENSORRT_RTX])
def test_without_a_gpu_and_targets_the_missing_driver_is_said(bundle: Bundle, library: str) -> None:
    with pytest.raises(BackendError, match="NVIDIA driver"):
        device_sets(bundle, library, ())


def test_a_bundle_that_is_fused_for_onnx_runtime_is_refused(bundle: Bundle) -> None:
    lengths = TensorFacts(name=abi.LENGTHS, dtype="int64", shape=("batch",))
    fused = GraphFacts(file="decoder.onnx", precision="float32", inputs=(lengths,), outputs=())
    graphs = bundle.manifest.graphs | {abi.EMBEDDER: fused}
    with pytest.raises(BackendError, match=r"embedder .* is fused for ONNX Runtime.*--form portable"):
        check_portable(Bundle(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs})))
    check_portable(bundle)


def test_a_folder_that_cannot_be_written_is_an_error(bundle: Bundle, build: Callable[[], EngineSet]) -> None:
    (bundle.folder / ENGINES).write_text("a file in the folder's place")
    with pytest.raises(BackendError, match="cannot write engines into"):
        build()


def command(*arguments: str) -> Any:
    """Run `mmemb build`; an app of one command takes its arguments alone."""
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, arguments)


def test_the_command_prints_the_table_and_exits_0_where_all_build(bundle: Bundle, rtx: Library) -> None:
    result = command(
        str(bundle.folder), "--check", "--library", "tensorrt-rtx", "--targets", "sm80,sm120", "--batch", "2", "--json"
    )
    assert result.exit_code == 0
    table = json.loads(result.stdout.splitlines()[-1])
    assert table["library"] == f"tensorrt-rtx {rtx.version}"
    assert [(row["target"], row["graph"], row["built"]) for row in table["graphs"]] == [
        (target, name, True) for target in ("sm80", "sm120") for name in abi.GRAPHS
    ]
    assert not (bundle.folder / ENGINES).exists()


def test_the_command_exits_1_and_says_why_where_a_graph_fails(bundle: Bundle, rtx: Library) -> None:
    """Turing has no float32 matrix products in TensorRT for RTX."""
    assert "sm75" in rtx.targets()
    result = command(str(bundle.folder), "--check", "--library", "tensorrt-rtx", "--targets", "sm75", "--batch", "2")
    assert result.exit_code == 1
    assert "gate, sm75: " in result.stdout
    assert "FP32 GEMM is not supported" in result.stdout


def test_the_command_builds_from_traffic_and_says_what_is_not_verified(
    bundle: Bundle, tmp_path: Path, rtx: Library
) -> None:
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text('"three"\n"three plus four"\n')
    result = command(
        str(bundle.folder), "--library", "tensorrt-rtx", "--targets", "sm89", "--batch", "2", "--traffic", str(traffic)
    )
    assert result.exit_code == 0
    assert "not verified: these engines were built ahead of time, for a GPU that is not here" in result.stdout
    (built,) = read_sets(bundle)
    assert built.version == rtx.version
    (box,) = built.engines[abi.EMBEDDER].profiles
    assert box[abi.TOKEN_IDS][2][1] < 100
