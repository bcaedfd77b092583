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

from mmemb_deploy.backends.cuda import Gpu
from mmemb_deploy.backends.tensorrt.api import TENSORRT, TENSORRT_RTX, Library
from mmemb_deploy.backends.tensorrt.files import (
    ENGINES,
    EngineSet,
    find_set,
    read_engine,
    read_model,
    read_sets,
    write_set,
)
from mmemb_deploy.backends.tensorrt.network import Network, Plan, Watcher
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError, OptionError
from mmemb_engines import build as build_module
from mmemb_engines.build import build_engines, check_portable, device_sets, without_direct
from mmemb_engines.check import check_graphs
from mmemb_engines.commands import register
from mmemb_engines.engines_only import write_engines_only
from mmemb_engines.graph import PreparedGraph
from mmemb_engines.profiles import demand_of_limits, profiles
from mmemb_engines.watch import Silent

TARGETS = ("sm80", "sm86", "sm120")  # beside sm89, those with float32 matrix products: all that it knows but Turing
NAMES = ["vision", "direct", "decoder", "gate"]  # of engines
OPTIONS = BuildOptions()

Built = tuple[Bundle, EngineSet]
Build = Callable[..., EngineSet]


def silent(_: str) -> Watcher:
    return Silent()


@pytest.fixture
def build(rtx: Library, quick: None) -> Build:  # noqa: ARG001 - so that it is quick
    """Build a bundle for sm89."""

    def run(bundle: Bundle, rows: int = 2, options: BuildOptions = OPTIONS, watch: Any = silent) -> EngineSet:
        (device,) = device_sets(bundle, TENSORRT_RTX, ("sm89",), options)[1]
        return build_engines(bundle, rtx, device, demand_of_limits(bundle.manifest, rows), options, watch)

    return run


def files(bundle: Bundle) -> dict[str, int]:
    """Map every file below the engines' folder to the time it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (bundle.folder / ENGINES).rglob("*") if path.is_file()}


def test_every_profile_of_every_graph_parses_and_builds(bundle: Bundle, rtx: Library) -> None:
    _, devices = device_sets(bundle, TENSORRT_RTX, ("sm89",), OPTIONS)
    rows = list(check_graphs(bundle, rtx, devices, demand_of_limits(bundle.manifest, 2), OPTIONS, silent))
    assert [row.graph for row in rows] == NAMES
    assert [row.error for row in rows if not (row.parsed and row.built)] == []
    assert all(row.size > 0 for row in rows)
    assert not any(row.decomposed for row in rows)  # float32 has no kernels of its own, and loses none


@pytest.mark.usefixtures("quick")
def test_every_graph_builds_for_every_target(bundle: Bundle, rtx: Library) -> None:
    _, devices = device_sets(bundle, TENSORRT_RTX, TARGETS, OPTIONS)
    rows = list(check_graphs(bundle, rtx, devices, demand_of_limits(bundle.manifest, 32), OPTIONS, silent))
    assert [(row.target, row.graph) for row in rows] == [(target, name) for target in TARGETS for name in NAMES]
    assert [row.error for row in rows if not row.built] == []


def test_engines_are_listed_with_all_they_depend_on(built: Built) -> None:
    bundle, engines = built
    assert engines.certificate is None
    assert engines.folder.startswith("tensorrt-rtx-sm89-1.")
    assert list(engines.engines) == NAMES
    for name, engine in engines.engines.items():
        assert engine.size == read_engine(bundle, engines, name).nbytes
        assert engine.profiles == profiles(name, bundle.manifest, demand_of_limits(bundle.manifest, 2))[:1]
        assert engine.options == OPTIONS
    assert engines.decomposed == []
    Bundle.open(bundle.folder)  # the bundle's own files are as they were


def test_engines_whose_key_has_not_changed_are_kept(built: Built, build: Build) -> None:
    bundle, engines = built
    before = files(bundle)
    assert build(bundle) == engines
    assert files(bundle) == before


def test_only_what_has_changed_is_built_again(built: Built, build: Build) -> None:
    bundle, engines = built
    before = files(bundle)
    write_set(bundle, engines.model_copy(update={"certificate": bundle.manifest.certificate}))
    layers = (bundle.folder / ENGINES / engines.folder / engines.engines["gate"].file).with_suffix(".json")
    layers.write_text("{}")
    changed = bundle.manifest.files | {"gate.onnx": "0" * 64}
    again = build(Bundle(bundle.folder, bundle.manifest.model_copy(update={"files": changed})))
    assert {name for name in NAMES if again.engines[name] != engines.engines[name]} == {"gate"}
    assert again.certificate is None  # it was measured on another gate
    after = files(bundle)
    assert engines.engines["gate"].file not in after
    assert not layers.exists()
    kept = {engines.engines[name].file for name in NAMES if name != "gate"}
    assert all(after[name] == before[name] for name in kept)


def test_other_profiles_and_options_are_other_engines(built: Built) -> None:
    bundle, engines = built
    built_gate = engines.engines["gate"]
    other = profiles("gate", bundle.manifest, demand_of_limits(bundle.manifest, 3))
    keys = {
        built_gate.key,
        engines.key(built_gate.graph, other, OPTIONS),
        engines.key(built_gate.graph, built_gate.profiles, BuildOptions(workspace=64)),
        engines.key(built_gate.graph, built_gate.profiles, BuildOptions(profiling="none")),
    }
    assert len(keys) == 4
    assert engines.key(built_gate.graph, built_gate.profiles, OPTIONS) == built_gate.key


def test_a_changed_engine_is_built_again(built: Built, build: Build) -> None:
    bundle, engines = built
    path = bundle.folder / ENGINES / engines.folder / engines.engines["gate"].file
    path.write_bytes(b"half an engine")
    build(bundle)
    read_engine(bundle, next(read_sets(bundle)), "gate")


class Impatient(Silent):
    """Interrupts a build at its third step, as Ctrl-C does."""

    def __init__(self) -> None:
        self.steps = 0

    def stepped(self, phase: str, step: int) -> None:
        del phase, step
        self.steps += 1
        if self.steps == 3:
            raise KeyboardInterrupt


def test_an_interrupted_build_keeps_what_was_finished(bundle: Bundle, build: Build) -> None:
    """The library must not see the exception, which would end the process."""
    with pytest.raises(KeyboardInterrupt):
        build(bundle, watch=lambda name: Impatient() if name == "direct" else Silent())
    (found,) = read_sets(bundle)
    assert set(found.engines) == {"vision"}
    read_engine(bundle, found, "vision")
    assert not [name for name in files(bundle) if name.startswith(".")]
    before = files(bundle)[found.engines["vision"].file]
    assert list(build(bundle).engines) == NAMES
    assert files(bundle)[found.engines["vision"].file] == before


def test_phases_are_told_in_order_and_all_end(bundle: Bundle, rtx: Library) -> None:
    told: list[tuple[str, str]] = []

    class Notes(Silent):
        def started(self, phase: str, parent: str | None, steps: int) -> None:
            told.append(("started", phase))
            assert steps >= 1
            assert parent is None or ("started", parent) in told

        def finished(self, phase: str) -> None:
            told.append(("finished", phase))

    boxes = profiles("gate", bundle.manifest, demand_of_limits(bundle.manifest, 2))
    Network(rtx, bundle.graph(abi.GATE)).build(boxes, OPTIONS, target="sm89", timings=b"", watcher=Notes())
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
        Network(rtx, bundle.graph(abi.GATE)).build([backwards], OPTIONS, target="sm89", timings=b"", watcher=Silent())


def test_targets_are_for_the_library_that_can_build_ahead_of_time(bundle: Bundle, rtx: Library) -> None:
    with pytest.raises(OptionError, match="TensorRT builds for the GPU that it runs on"):
        device_sets(bundle, TENSORRT, ("sm89",), OPTIONS)
    with pytest.raises(OptionError, match=r"target 'sm90' is not known: choose from .*sm89"):
        device_sets(bundle, TENSORRT_RTX, ("sm90",), OPTIONS)
    assert rtx.version.startswith("1.")


@pytest.mark.no_gpu
@pytest.mark.parametrize("library", [TENSORRT, TENSORRT_RTX])
def test_without_a_gpu_and_targets_the_missing_driver_is_said(bundle: Bundle, library: str) -> None:
    with pytest.raises(BackendError, match="NVIDIA driver"):
        device_sets(bundle, library, (), OPTIONS)


@pytest.mark.usefixtures("rtx")
def test_a_gpu_that_the_library_does_not_build_for_is_named_with_those_it_does(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "probe", lambda **_: Gpu("NVIDIA Jetson AGX Orin", "sm87"))
    with pytest.raises(BackendError, match=r"builds for .*sm89.*, and NVIDIA Jetson AGX Orin is sm87: use --library"):
        device_sets(bundle, TENSORRT_RTX, (), OPTIONS)


def test_engines_built_ahead_are_found_on_every_gpu_of_their_capability(built: Built) -> None:
    bundle, engines = built
    wanted = engines.model_copy(update={"device": "NVIDIA L4", "engines": {}})
    assert find_set(bundle, wanted) == engines
    with pytest.raises(BackendError, match=r"no engines for NVIDIA A10 \(sm86\) .*: its engines are for sm89 with"):
        find_set(bundle, wanted.model_copy(update={"device": "NVIDIA A10", "target": "sm86"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(optimization_level=5), "optimization level is 5: TensorRT for RTX does not build so"),
        (BuildOptions(hardware="ampere+"), r"hardware is ampere\+: TensorRT for RTX does not build so"),
        (BuildOptions(version_compatible=True), "version compatible is True: TensorRT for RTX does not build so"),
    ],
)
def test_options_that_a_library_lacks_are_refused(
    bundle: Bundle, rtx: Library, options: BuildOptions, message: str
) -> None:
    assert rtx.name == TENSORRT_RTX
    with pytest.raises(OptionError, match=message):
        device_sets(bundle, TENSORRT_RTX, ("sm89",), options)


def test_lengths_are_refused_by_releases_that_forget_what_is_causal(
    bundle: Bundle, rtx: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "version", "1.6.1.120")
    with pytest.raises(OptionError, match=r"tensorrt-rtx 1.6.1.120 does not read lengths .* as 1.7 does; pass 'mask'"):
        device_sets(bundle, TENSORRT_RTX, ("sm89",), BuildOptions(attention="lengths"))


@pytest.mark.parametrize(
    "asked",
    [{"workspace": 0}, {"optimization_level": 6}, {"hardware": "hopper"}, {"profiling": "all"}, {"attention": "paged"}],
)
def test_values_that_no_library_takes_are_refused(asked: dict[str, Any]) -> None:
    ((name, value),) = asked.items()
    with pytest.raises(OptionError, match=rf"{name.replace('_', ' ')} .*{value}"):
        BuildOptions(**asked)


def test_a_stripped_engine_keeps_the_graph_that_names_its_weights(
    bundle: Bundle, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT for RTX fails to strip without a GPU, so that nothing is built here."""

    class Stripped:
        def build(self, *_: Any, **__: Any) -> Plan:
            return Plan(memoryview(b"an engine"), b"", decomposed=False)

    monkeypatch.setattr(Library, "check_options", lambda *_: None)
    monkeypatch.setattr(build_module, "parse", lambda *_: (Stripped(), PreparedGraph(b"a graph", None)))
    engines = build(bundle, options=BuildOptions(strip=True))
    assert read_model(bundle, engines, "decoder") == b"a graph"
    before = files(bundle)
    build(bundle, options=BuildOptions(strip=True))
    assert files(bundle) == before
    engines.path(bundle, "decoder").with_suffix(".onnx").write_bytes(b"another graph")
    with pytest.raises(BackendError, match=r"decoder-.*onnx was changed"):
        read_model(bundle, engines, "decoder")
    again = build(bundle, options=BuildOptions(strip=True))
    assert read_model(bundle, again, "decoder") == b"a graph"
    with pytest.raises(OptionError, match=r"stripped engines need the bundle.s weights; leave --strip out"):
        write_engines_only(bundle, [again], bundle.folder.parent / "alone")


def test_a_bundle_that_is_fused_for_onnx_runtime_is_refused(bundle: Bundle) -> None:
    fused = bundle.manifest.graphs[abi.EMBEDDER].model_copy(update={"form": "fused"})
    graphs = bundle.manifest.graphs | {abi.EMBEDDER: fused}
    with pytest.raises(BackendError, match=r"embedder .* is fused for ONNX Runtime.*--form portable"):
        check_portable(Bundle(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs})))
    check_portable(bundle)


def test_the_only_graph_for_prompts_cannot_be_left_out(bundle: Bundle) -> None:
    graphs = {name: bundle.manifest.graphs[name] for name in (abi.VISION, abi.DIRECT)}
    with pytest.raises(OptionError, match=r"--no-direct: .* does not reason, and has no other graph for prompts"):
        without_direct(Bundle(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs})))


def test_a_folder_that_cannot_be_written_is_an_error(bundle: Bundle, build: Build) -> None:
    (bundle.folder / ENGINES).write_text("a file in the folder's place")
    with pytest.raises(BackendError, match="cannot write engines into"):
        build(bundle)


def command(*arguments: str) -> Any:
    """Run `mmemb build`; an app of one command takes its arguments alone."""
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, arguments)


@pytest.mark.usefixtures("quick")
def test_the_command_prints_the_table_and_exits_0_where_all_build(bundle: Bundle, rtx: Library) -> None:
    result = command(
        str(bundle.folder), "--check", "--library", "tensorrt-rtx", "--targets", "sm80", "--batch", "2", "--json"
    )
    assert result.exit_code == 0
    table = json.loads(result.stdout.splitlines()[-1])
    assert table["library"] == f"tensorrt-rtx {rtx.version}"
    assert [(row["target"], row["graph"], row["built"]) for row in table["graphs"]] == [
        ("sm80", name, True) for name in NAMES
    ]
    assert not (bundle.folder / ENGINES).exists()


@pytest.mark.usefixtures("quick")
def test_the_command_exits_1_and_says_why_where_a_graph_fails(bundle: Bundle, rtx: Library) -> None:
    """Turing has no float32 matrix products in TensorRT for RTX."""
    assert "sm75" in rtx.targets()
    result = command(str(bundle.folder), "--check", "--library", "tensorrt-rtx", "--targets", "sm75", "--batch", "2")
    assert result.exit_code == 1
    assert "gate, sm75: " in result.stdout
    assert "FP32 GEMM is not supported" in result.stdout


@pytest.mark.usefixtures("quick")
def test_the_command_builds_from_traffic_and_says_what_is_not_verified(
    bundle: Bundle, tmp_path: Path, rtx: Library
) -> None:
    traffic, alone = tmp_path / "traffic.jsonl", tmp_path / "alone"
    traffic.write_text('"three"\n"three plus four"\n')
    asked = "--library", "tensorrt-rtx", "--targets", "sm89", "--batch", "2", "--traffic", str(traffic)
    result = command(str(bundle.folder), *asked, "--engines-only", str(alone), "--workspace", "64")
    assert result.exit_code == 0
    assert str(alone) in result.stdout
    assert "not verified: these engines were built ahead of time, for a GPU that is not here" in result.stdout
    (built,) = read_sets(Bundle.open(alone))
    assert built.version == rtx.version
    assert {each.options for each in built.engines.values()} == {BuildOptions(workspace=64)}
    assert built.engines["direct"].profiles[0][abi.TOKEN_IDS][2][1] < 100
