"""The pytest-benchmark suite runs on any bundle, on inputs that are never the same, and says what it ran on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemb_benchmarks.commands.speed import suite
from mmemb_benchmarks.suite import run_suite
from mmemb_benchmarks.suite.setting import FEWEST, Setting
from mmemb_benchmarks.workload import KINDS, load_uncached
from mmemb_deploy import OptionError
from mmemb_deploy.bundle.folder import Bundle


@pytest.fixture(scope="module")
def setting(fused_bundle: Path) -> Setting:
    return Setting(*load_uncached(fused_bundle, "auto", 1), seconds=0, passes=1)


@pytest.fixture(autouse=True)
def not_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark times nothing in a process that pytest-xdist started."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.mark.parametrize("workload", KINDS)
def test_a_workload_fits_the_bundle_and_is_never_the_same(setting: Setting, workload: str) -> None:
    first, second = (setting.maker.row(setting.content(workload)) for _ in range(2))
    assert first.length < setting.manifest.batch.row_tokens
    assert (first.visual_tokens > 0) == ("text" not in workload or "images" in workload)
    if first.visuals:
        assert not np.array_equal(first.visuals[0].pixels_THWC, second.visuals[0].pixels_THWC)
    else:
        assert not np.array_equal(first.token_ids_S, second.token_ids_S)


def run(setting: Setting, output: Path, select: str) -> dict[str, Any]:
    assert run_suite(setting, output, select) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_every_stage_is_timed_and_says_on_what(setting: Setting, tmp_path: Path) -> None:
    found = run(setting, tmp_path / "stages.json", "bench_stages")
    names = {benchmark["name"].partition("[")[0] for benchmark in found["benchmarks"]}
    assert names == {"bench_preprocess", "bench_vision", "bench_prefill", "bench_gate", "bench_decode"}
    for benchmark in found["benchmarks"]:
        assert benchmark["stats"]["rounds"] >= FEWEST
        assert benchmark["extra_info"]["p95"] >= benchmark["stats"]["median"] > 0
    assert found["bundle"]["hash"] == run(setting, tmp_path / "again.json", "bench_gate")["bundle"]["hash"]
    assert found["machine_info"]["cores"] >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"stages.json", "again.json"}


def test_passes_share_the_rounds_and_pool_them(fused_bundle: Path, tmp_path: Path) -> None:
    setting = Setting(*load_uncached(fused_bundle, "auto", 1), seconds=0, passes=2)
    (gate,) = run(setting, tmp_path / "gate.json", "bench_gate and 8")["benchmarks"]
    assert gate["stats"]["rounds"] == len(gate["stats"]["data"]) == FEWEST
    assert gate["stats"]["median"] == pytest.approx(np.median(gate["stats"]["data"]))


def test_every_workload_is_timed_on_every_route(setting: Setting, tmp_path: Path) -> None:
    found = run(setting, tmp_path / "one.json", "bench_one or (bench_traffic and mixed)")
    by_name = {benchmark["name"]: benchmark["extra_info"] for benchmark in found["benchmarks"]}
    for workload in KINDS:
        fast, reasoned = (by_name[f"bench_one[{route}-{workload}]"] for route in ("fast only", "reason only"))
        assert fast["rationale_tokens"] == 0 < reasoned["rationale_tokens"] <= 16
        assert fast["tokens"] > fast["visual_tokens"]
    assert by_name["bench_traffic[mixed]"]["inputs"] == 8


def test_a_bundle_that_does_not_reason_skips_what_reasons(setting: Setting, tmp_path: Path) -> None:
    manifest = setting.manifest.model_copy(update={"gate": None})
    fast_only = Setting(
        Bundle(setting.bundle.folder, manifest), replace(setting.engine, gate=None), seconds=0, passes=1
    )
    found = run(fast_only, tmp_path / "fast.json", "bench_gate or bench_decode or (bench_one and short)")
    assert [benchmark["name"] for benchmark in found["benchmarks"]] == ["bench_one[fast only-short text]"]


def test_the_command_shows_the_pooled_medians_and_where_the_results_lie(
    fused_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gate.json"
    suite(bundle=fused_bundle, threads=1, seconds=0, passes=2, select="bench_gate and 8", output=output)
    told = capfd.readouterr()
    assert f"results: {output}" in told.out
    assert "gate: 8" in told.out
    assert "Wrote benchmark data" not in told.out + told.err


def test_a_selection_of_nothing_is_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.warns(match="no benchmarks"), pytest.raises(OptionError, match="--select is 'nonsense'"):
        run_suite(setting, tmp_path / "none.json", "nonsense")


def test_an_output_in_no_folder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="create it first"):
        suite(bundle=tmp_path / "no bundle", output=tmp_path / "missing" / "suite.json")
