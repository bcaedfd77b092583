"""Results are read as they were written, the committed ones too, and their figures are shown in one way."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mmemb_benchmarks.results import KINDS, command, digits, read_result, read_results, stamp, write

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_committed_results_are_read() -> None:
    results, passed_over = read_results([RESULTS])
    assert {result.kind for result in results} >= KINDS.keys()
    assert {path.name.split("-", 3)[3] for path in passed_over} == {
        "ablation-cpu.json",
        "builds-qwen3-vl-2b-float16-rtx.json",
        "builds-qwen3-vl-2b-rtx.json",
        "digitchain-cpu.json",
        "memory-cpu.json",
        "memory-nano-cpu.json",
        "overlap-small-cpu.json",
        "peers-cpu.json",
        "precisions-cpu.json",
        "runtime-cpu.json",
        "scale-cpu.json",
        "scale-million-cpu.json",
        "search-1024-cpu.json",
        "search-128-cpu.json",
        "strips-cpu.json",
        "tensorrt-rtx.json",
    }


@pytest.mark.parametrize("kind", ["latency", "frontier", "load", "overload", "peers"])
def test_a_result_is_read_as_it_was_written(tmp_path: Path, results_by_kind: dict[str, Any], kind: str) -> None:
    path = tmp_path / f"{kind}.json"
    path.write_text(json.dumps(results_by_kind[kind]))
    stamped = stamp(kind, read_result(path).result, None)
    write(stamped, path)
    assert read_result(path).model_dump() == stamped.model_dump()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.000123, "0.000123"),
        (0.00001234, "0.0000123"),
        (0.5, "0.5"),
        (9.999, "10"),
        (-9.994, "-9.99"),
        (123.4, "123"),
        (999.4, "999"),
        (999.6, "1000"),
        (12345, "12345"),
        (1e7, "10000000"),
    ],
)
def test_a_figure_has_three_digits_or_all_before_the_point_and_no_exponent(value: float, shown: str) -> None:
    assert digits(value) == shown


@pytest.mark.parametrize(
    ("program", "named"),
    [
        ("/env/bin/mmemb", "mmemb"),
        ("/env/mmemb_deploy/__main__.py", "mmemb"),
        ("/clone/benchmarks/builds.py", "python benchmarks/builds.py"),
    ],
)
def test_a_command_is_named_by_what_was_run_and_shows_no_folders(
    program: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "/runs/2b", "--workload", "long text"])
    assert command() == f"{named} 2b --workload 'long text'"
