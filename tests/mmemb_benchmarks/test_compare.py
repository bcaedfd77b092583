"""`mmemb bench compare` names what moved, and nothing that is noise."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from mmemb_benchmarks.commands.outcome import compare as command
from mmemb_benchmarks.compare import compare
from mmemb_benchmarks.results import read_result
from mmemb_deploy import OptionError

Results = dict[str, Any]


def stats(median: float, half: float = 0.05) -> dict[str, float]:
    return {"median": median, "q1": median * (1 - half), "q3": median * (1 + half)}


def saved(folder: Path, name: str, content: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def exit_code(*arguments: Any, **options: Any) -> int:
    with pytest.raises(typer.Exit) as caught:
        command(*arguments, **options)
    return caught.value.exit_code


@pytest.mark.parametrize("kind", ["suite", "latency", "peers"])
def test_a_run_does_not_differ_from_itself(tmp_path: Path, results_by_kind: Results, kind: str) -> None:
    path = saved(tmp_path, "same", results_by_kind[kind])
    found = compare(read_result(path), read_result(path), 0.1)
    assert not found.slower | found.faster
    assert found.unmoved > 0
    assert exit_code(path, path) == 0


def test_the_times_of_every_kind_are_compared(tmp_path: Path, results_by_kind: Results) -> None:
    old = {kind: saved(tmp_path, kind, results_by_kind[kind]) for kind in ("suite", "latency", "peers")}
    results_by_kind["suite"]["benchmarks"][0]["stats"] = stats(0.0137)
    auto = results_by_kind["latency"]["result"]["modes"]["auto"]
    auto |= {"p50_ms": 2 * auto["p50_ms"], "p50_ms_spread": [2 * auto["p50_ms"]] * 2}
    int8 = results_by_kind["peers"]["result"]["peers"]["int8"]
    int8 |= {"seconds": {"embed x1": 0.208}, "spread": {"embed x1": [0.2, 0.21]}}
    names = {"suite": "bench_gate[8]", "latency": "auto: p50", "peers": "int8: embed x1"}
    for kind, name in names.items():
        new = saved(tmp_path, f"new {kind}", results_by_kind[kind])
        assert compare(read_result(old[kind]), read_result(new), 0.1).slower == {name: pytest.approx(2)}


def test_what_became_slower_is_named_and_fails(
    tmp_path: Path, results_by_kind: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = results_by_kind["suite"]
    old = saved(tmp_path, "old", suite)
    suite["benchmarks"][0]["stats"] = stats(2 * suite["benchmarks"][0]["stats"]["median"])
    new = saved(tmp_path, "new", suite)
    assert exit_code(old, new, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["slower"] == {"bench_gate[8]": 2.0}
    assert exit_code(new, old, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["faster"] == {"bench_gate[8]": 0.5}


def test_a_name_is_printed_whole(tmp_path: Path, results_by_kind: Results, capsys: pytest.CaptureFixture[str]) -> None:
    old = saved(tmp_path, "old", results_by_kind["suite"])
    results_by_kind["suite"]["benchmarks"][1]["stats"] = stats(2.0)
    assert exit_code(old, saved(tmp_path, "new", results_by_kind["suite"])) == 1
    assert "bench_prefill[long text]" in capsys.readouterr().out


def test_a_shift_within_the_spread_or_the_tolerance_is_noise(tmp_path: Path, results_by_kind: Results) -> None:
    first, second = results_by_kind["suite"]["benchmarks"]
    first["stats"], second["stats"] = stats(1.0), stats(0.1)
    old = read_result(saved(tmp_path, "old", results_by_kind["suite"]))
    for shifted in (stats(1.3, half=0.3), stats(1.08, half=0.01)):
        first["stats"], second["stats"] = shifted, stats(0.1, half=0.01)
        assert not compare(old, read_result(saved(tmp_path, "new", results_by_kind["suite"])), 0.1).slower


def test_other_circumstances_and_lost_benchmarks_are_told(tmp_path: Path, results_by_kind: Results) -> None:
    suite = results_by_kind["suite"]
    old = read_result(saved(tmp_path, "old", suite))
    suite["bundle"]["hash"] = "2e"
    suite["machine_info"]["versions"] = {"numpy": "2.4", "onnxruntime": "1.32"}
    suite["benchmarks"][0]["name"] = "vision"
    found = compare(old, read_result(saved(tmp_path, "new", suite)), 0.1)
    assert found.differing == ["bundle: 1f2e3d4c5b6a79 before, 2e now", "onnxruntime: None before, 1.32 now"]
    assert (found.missing, found.added) == (["bench_gate[8]"], ["vision"])


def test_results_that_do_not_compare_are_refused(tmp_path: Path, results_by_kind: Results) -> None:
    suite, latency, load = (saved(tmp_path, kind, results_by_kind[kind]) for kind in ("suite", "latency", "load"))
    with pytest.raises(OptionError, match="'suite' does not compare with one of 'latency'"):
        compare(read_result(suite), read_result(latency), 0.1)
    with pytest.raises(OptionError, match=r"load\.json is a result of kind 'load', none of suite, latency, peers"):
        command(load, load)
    del results_by_kind["latency"]["result"]["modes"]["auto"]["p50_ms_spread"]
    with pytest.raises(OptionError, match=r"half\.json is not a whole result: .*p50_ms_spread"):
        command(saved(tmp_path, "half", results_by_kind["latency"]), latency)
    with pytest.raises(OptionError, match="cannot be read as JSON"):
        read_result(tmp_path / "missing.json")
