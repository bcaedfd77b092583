"""`mmemb bench compare` names what moved, and nothing that is noise."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from mmemb_benchmarks.commands.outcome import compare as command
from mmemb_benchmarks.compare import compare, read_run
from mmemb_deploy import OptionError

MACHINE = {"device": "a processor, 2 cores", "versions": {"numpy": "2.4"}}


def stats(median: float, half: float = 0.05) -> dict[str, float]:
    return {"median": median, "q1": median * (1 - half), "q3": median * (1 + half)}


SUITE: dict[str, Any] = {
    "machine_info": MACHINE,
    "bundle": {"hash": "1f"},
    "benchmarks": [{"name": "prefill[long text]", "stats": stats(1.0)}, {"name": "decode[8]", "stats": stats(0.1)}],
}
LATENCY: dict[str, Any] = {
    "kind": "latency",
    "machine": MACHINE,
    "bundle": {"hash": "1f"},
    "result": {"modes": {"auto": {"p50_ms": 2.0, "p50_ms_spread": [1.9, 2.1]}}},
}
PEERS: dict[str, Any] = {
    "kind": "peers",
    "machine": MACHINE,
    "bundle": None,
    "result": {"peers": {"transformers": {"seconds": {"embed x1": 0.6}, "spread": {"embed x1": [0.55, 0.7]}}}},
}


def saved(folder: Path, name: str, content: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def exit_code(*arguments: Any, **options: Any) -> int:
    with pytest.raises(typer.Exit) as caught:
        command(*arguments, **options)
    return caught.value.exit_code


@pytest.mark.parametrize("content", [SUITE, LATENCY, PEERS], ids=["suite", "latency", "peers"])
def test_a_run_does_not_differ_from_itself(tmp_path: Path, content: Any) -> None:
    path = saved(tmp_path, "same", content)
    found = compare(read_run(path), read_run(path), 0.1)
    assert not found.slower | found.faster
    assert found.unmoved > 0
    assert exit_code(path, path) == 0


def test_what_became_slower_is_named_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = copy.deepcopy(SUITE)
    slow["benchmarks"][1]["stats"] = stats(0.2)
    old, new = saved(tmp_path, "old", SUITE), saved(tmp_path, "new", slow)
    assert exit_code(old, new, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["slower"] == {"decode[8]": 2.0}
    assert exit_code(new, old, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["faster"] == {"decode[8]": 0.5}


def test_a_name_is_printed_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = copy.deepcopy(SUITE)
    slow["benchmarks"][0]["stats"] = stats(2.0)
    assert exit_code(saved(tmp_path, "old", SUITE), saved(tmp_path, "new", slow)) == 1
    assert "prefill[long text]" in capsys.readouterr().out


def test_a_shift_within_the_spread_or_the_tolerance_is_noise(tmp_path: Path) -> None:
    wide, near = copy.deepcopy(SUITE), copy.deepcopy(SUITE)
    wide["benchmarks"][0]["stats"] = stats(1.3, half=0.3)
    near["benchmarks"][0]["stats"] = stats(1.08, half=0.01)
    near["benchmarks"][1]["stats"] = stats(0.1, half=0.01)
    old = read_run(saved(tmp_path, "old", SUITE))
    for name, content in (("wide", wide), ("near", near)):
        assert not compare(old, read_run(saved(tmp_path, name, content)), 0.1).slower


def test_other_circumstances_and_lost_benchmarks_are_told(tmp_path: Path) -> None:
    other = copy.deepcopy(SUITE)
    other["bundle"]["hash"] = "2e"
    other["benchmarks"][0]["name"] = "vision"
    found = compare(read_run(saved(tmp_path, "old", SUITE)), read_run(saved(tmp_path, "new", other)), 0.1)
    assert found.differing == ["bundle: 1f before, 2e now"]
    assert (found.missing, found.added) == (["prefill[long text]"], ["vision"])


def test_results_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    suite, latency = (saved(tmp_path, name, content) for name, content in (("suite", SUITE), ("latency", LATENCY)))
    with pytest.raises(OptionError, match="'suite' does not compare with one of 'latency'"):
        compare(read_run(suite), read_run(latency), 0.1)
    with pytest.raises(OptionError, match=r"load\.json is a result of kind 'load'"):
        read_run(saved(tmp_path, "load", {"kind": "load"}))
    with pytest.raises(OptionError, match=r"half\.json is not a whole result"):
        read_run(saved(tmp_path, "half", {"kind": "latency", "machine": MACHINE, "result": {}}))
    with pytest.raises(OptionError, match="cannot be read as JSON"):
        read_run(tmp_path / "missing.json")
