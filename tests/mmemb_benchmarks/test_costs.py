"""The measurements of speed run, compare like with like, and leave nothing behind. No figure is asserted."""

from pathlib import Path

import onnxruntime
import pytest

from mmemb_benchmarks.measure.costs import measure_loading, measure_runtime, measure_startup
from mmemb_benchmarks.timing import graph_seconds
from mmemb_benchmarks.workload import Maker
from mmemb_deploy import Embedder
from mmemb_deploy.bundle.folder import NANO


def test_time_in_graphs_is_part_of_the_whole_and_the_session_is_as_it_was(fused_bundle: Path) -> None:
    before = onnxruntime.InferenceSession.run
    found = measure_runtime(
        Embedder.load(fused_bundle, threads=1), tokens=30, batch=2, written=3, rounds=1, report=lambda _: None
    )
    assert onnxruntime.InferenceSession.run is before
    assert 0 < found["overhead never"] < 1
    assert 0 < found["overhead always"] < 1
    assert found["tokens of a prompt over those after its prefix"] > 1


@pytest.mark.parametrize("bundle", [None, "fused_bundle"])
def test_the_texts_have_as_many_tokens_as_were_asked_for(bundle: str | None, request: pytest.FixtureRequest) -> None:
    embedder = Embedder.load(bundle and request.getfixturevalue(bundle), threads=1)
    found = measure_runtime(embedder, tokens=40, batch=1, written=1, rounds=1, report=lambda _: None)
    row = Maker(embedder.encoder, embedder.manifest).row("a")
    length = row.length - 1 + 40
    assert found["tokens of a prompt over those after its prefix"] == length / (length - row.prefix)


def test_no_time_in_graphs_is_missed(fused_bundle: Path) -> None:
    embedder = Embedder.load(fused_bundle)
    with graph_seconds() as spent:
        embedder.encode(["a"], reasoning="never")
    assert len(spent) == 2  # the prompt, and the gate


def test_loading_is_measured_in_processes_of_their_own(fused_bundle: Path) -> None:
    found = measure_loading(fused_bundle, "auto", 1, None, runs=1)
    assert found["weights, bytes"] == sum(path.stat().st_size for path in fused_bundle.glob("*.onnx.data"))
    for path in ("never", "always"):
        assert found[f"bundle, {path}: peak bytes"] > 2**24


def test_start_up_is_measured_part_by_part() -> None:
    found = measure_startup(NANO, "auto", 1, runs=1)
    assert set(found) == {"import package", "import Embedder", "Embedder.load"}
    assert min(found.values()) > 0
