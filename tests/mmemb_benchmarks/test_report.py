"""The report is one page that needs nothing else, shows what it was given, and refuses what it cannot read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmemb_benchmarks.report import write_report
from mmemb_deploy import OptionError

STAMP = {
    "date": "2026-11-23",
    "command": "mmemb bench <kind>",
    "machine": {"device": "a processor, 2 cores", "versions": {"numpy": "2.4"}},
    "bundle": {"name": "nano", "precision": "float32", "hash": "1f2e3d4c5b6a79", "backend": "an engine"},
}
STAGES = dict.fromkeys(("preprocess", "vision", "prefill", "gate", "decode", "other"), 0.5)


def mode(p50: float, hits: float | None) -> dict[str, Any]:
    return {
        "p50_ms": p50,
        "p95_ms": 2 * p50,
        "p99_ms": 3 * p50,
        "p50_ms_spread": [0.9 * p50, 1.1 * p50],
        "throughput_per_s": 777,
        "reasoning_rate": 0.25,
        "rationale_tokens": 5.4,
        "hit_at_1": hits,
        "joules_per_request": None,
        "stages_ms": STAGES,
    }


def point(latency: float, hits: float, threshold: float | None = None) -> dict[str, Any]:
    return {
        "threshold": threshold,
        "reasoning_rate": 0.25,
        "hit_at_1": hits,
        "latency_ms": latency,
        "rationale_tokens": 5,
    }


CEILING = {
    "copy_gb_per_s": 33,
    "matmul_gflop_per_s": 401,
    "matmul_type": "float32",
    "prefill_share": 0.5,
    "decode_share": 0.25,
}
LATENCY = {
    "requests": 200,
    "rounds": 5,
    "batch_size": 32,
    "source": "DigitChain",
    "ceiling": CEILING,
    "modes": {"never": mode(0.641, 0.777), "auto": mode(0.653, 0.922), "always": mode(4.02, 0.921)},
}
FRONTIER = {
    "pairs": 400,
    "source": "DigitChain",
    "default": point(2.0, 0.9, 0.8),
    "curve": [point(1, 0.7, 1.0), point(2, 0.9, 0.8), point(4, 0.9, 0)],
    "random": [point(1, 0.7), point(4, 0.9)],
    "oracle": [point(1, 0.7), point(4, 0.9)],
}
TRIAL = {"rate_per_s": 90, "p95_ms": 12, "held": True}
LOAD = {
    "target_p95_ms": 19.5,
    "batch_size": 32,
    "source": "DigitChain",
    "ratio": {"auto over always": 2.31},
    "modes": {name: {"sustainable_per_s": 432.0, "trials": [TRIAL]} for name in ("never", "auto", "always")},
}
PEERS = {
    "tokens": 256,
    "threads": 2,
    "rounds": 5,
    "baseline": "transformers",
    "left_out": {"vllm": "it needs <a GPU>"},
    "peers": {
        "transformers": {"cosine": 1.0, "seconds": {"embed x1": 0.617}},
        "int8": {"cosine": 0.99907, "seconds": {"embed x1": 0.104}},
    },
}
GATE = {"name": "bench_gate[8]", "stats": {"median": 0.00685, "rounds": 60}, "extra_info": {"p95": 0.0091, "tokens": 8}}
SUITE = {
    "datetime": "2026-11-23T10:00:00",
    "machine_info": STAMP["machine"],
    "bundle": STAMP["bundle"],
    "command": "mmemb bench suite",
    "benchmarks": [GATE],
}
RESULTS: dict[str, Any] = {
    kind: {**STAMP, "kind": kind, "result": result}
    for kind, result in (("latency", LATENCY), ("frontier", FRONTIER), ("load", LOAD), ("peers", PEERS))
} | {"suite": SUITE}
RESULTS["peers"]["bundle"] = None


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for kind, content in RESULTS.items():
        (folder / f"{kind}.json").write_text(json.dumps(content))
    return folder


def test_the_page_shows_every_figure_and_refers_to_nothing_outside(results: Path, tmp_path: Path) -> None:
    page, passed_over = write_report([results], tmp_path / "out")
    html = page.read_text()
    assert not passed_over
    for figure in ("0.653", "0.922", "92.2%", "19.5", "2.31", "0.617", "0.99907", "6.85", "9.1", "401", "1f2e3d4c5b6a"):
        assert figure in html, figure
    assert "it needs &lt;a GPU&gt;" in html
    targets = re.findall(r"""(?:src|srcset|href)="([^"]*)""", html)
    assert targets
    assert all(target.startswith("data:image/svg+xml;base64,") for target in targets)
    assert not re.search(r"url\(|@import|<script", html)


def test_every_chart_is_drawn_for_both_themes_and_told_in_words(results: Path, tmp_path: Path) -> None:
    page, _ = write_report([results], tmp_path / "out")
    html = page.read_text()
    pictures = re.findall(r"<picture>.*?</picture>", html, flags=re.DOTALL)
    assert len(pictures) == len(list((tmp_path / "out").glob("*.png"))) == 5
    for picture in pictures:
        dark, light = re.findall(r'="(data:[^"]*)"', picture)
        assert dark != light
        assert re.search(r'alt="[^"]*\d', picture)


@pytest.mark.parametrize(("kind", "title"), [("latency", "Latency"), ("load", "What a server sustains")])
def test_a_section_is_there_with_its_result_alone(results: Path, tmp_path: Path, kind: str, title: str) -> None:
    assert f"<h3>{title}</h3>" in write_report([results / f"{kind}.json"], tmp_path / "with")[0].read_text()
    (results / f"{kind}.json").unlink()
    assert f"<h3>{title}</h3>" not in write_report([results], tmp_path / "without")[0].read_text()


def test_what_is_not_a_whole_result_is_refused_and_nothing_is_written(results: Path, tmp_path: Path) -> None:
    broken = json.loads((results / "load.json").read_text())
    del broken["result"]["modes"]["auto"]["trials"]
    (results / "load.json").write_text(json.dumps(broken))
    with pytest.raises(OptionError, match=r"load\.json is not a whole result: .*modes\.auto\.trials"):
        write_report([results], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="does not exist"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")


def test_other_results_of_a_folder_are_passed_over_and_named_ones_refused(results: Path, tmp_path: Path) -> None:
    other = results / "ablation.json"
    other.write_text('{"kind": "ablation"}')
    assert write_report([results], tmp_path / "out")[1] == [other]
    with pytest.raises(OptionError, match=r"ablation\.json is a result of kind 'ablation'"):
        write_report([other], tmp_path / "out")


def test_other_files_of_the_folder_stay(results: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    write_report([results], kept.parent)
    assert kept.read_text() == "mine"
