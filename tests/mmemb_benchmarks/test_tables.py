"""The tables of documents hold the figures that the committed results hold, and say where they are from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmemb_benchmarks.report.tables import headline, tables
from mmemb_deploy import OptionError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = {
    "digitchain": [
        "|  | never | always | **auto** | random gate | oracle gate | rationale shuffled | rationale emptied |",
        "| match: the same drawing, among look-alikes | 0.825 | 0.809 | **0.825** | 0.821 | 0.854 | 0.795 | 0.708 |",
        "| chain of 5 | 0.235 | 0.973 | **0.972** | 0.410 | 0.975 | 0.120 | 0.122 |",
        "| mixed traffic: hit@1 | 0.777 | 0.921 | **0.922** | 0.816 | 0.938 | 0.382 | 0.701 |",
        "| mixed traffic: rationale tokens | 0.0 | 14.5 | **5.2** | 3.5 | 3.7 | 14.5 | 0.0 |",
        "| mixed traffic: reasoning rate | 0.00 | 1.00 | **0.23** | 0.23 | 0.16 | 1.00 | 1.00 |",
        "| mixed traffic: median ms, one query alone | 0.9 | 3.5 | **1.0** | 1.1 | 1.0 | 1.5 | 1.3 |",
    ],
    "selection": [
        "| none dropped (all candidates) | 0.861 | 10.9 | 1.00 | 0.861 | 0.792 |",
        "| right in themselves (instance-level) | 0.841 | 9.0 | 1.00 | 0.841 | 0.796 |",
        "| that help their pair (gain) | 0.928 | 6.1 | 0.22 | 0.904 | 0.788 |",
        "| **that help by what they say (gain and content)** | **0.928** | 6.2 | 0.23 | 0.928 | 0.787 |",
    ],
    "decision": [
        "| never / always | 0.790 / 0.922 | 0 / 1 | 0 / 14.6 |",
        "| random, at auto's rate | 0.823 | 0.25 | 3.6 |",
        "| the stage-3 decision, at auto's rate | 0.922 | 0.25 | 5.5 |",
        "| the decision after GRPO (auto) | 0.922 | 0.25 | 5.4 |",
        "| oracle | 0.937 | 0.15 | 3.6 |",
    ],
    "reward": [
        "| stage 3, no reinforcement | 0.925 | 0.22 | 6.0 |",
        "| cost 0 / 0.1 / 2 | 0.920 / 0.922 / 0.921 | 0.44 / 0.25 / 0.23 | 14.0 / 5.4 / 5.2 |",
        "| without paired groups | 0.922 | 0.24 | 5.3 |",
    ],
    "strips-control": [
        "| random, at reinforcement's rate | 0.745 ± 0.003 | 0.35 |  |  |  |  |  |",
        "| stage 3's decision, its threshold calibrated | 0.903 ± 0.004 | 0.37 | 6.5 | 0.89 | 0.891 ± 0.004 "
        "| 0.007 ± 0.002 (0.005 to 0.010) | 0.008 ± 0.001 (0.006 to 0.011) |",
        "| **reinforcement** | 0.910 ± 0.003 | 0.35 | 6.1 | 0.91 | 0.899 ± 0.004 |  |  |",
        "| oracle, at that rate | 0.927 ± 0.003 | 0.35 |  | 1.00 |  |  |  |",
    ],
    "strips-families": [
        "| always | 0.992 | 0.956 | 0.913 | 0.917 | 0.987 | 0.690 |",
        "| always, rationales shuffled | 0.344 | 0.208 | 0.362 | 0.748 | 0.983 | 0.517 |",
        "| **reinforcement** | 0.992 | 0.951 | 0.905 | 0.978 | 0.988 | 0.724 |",
    ],
    "strips-selection": [
        "| right in themselves (instance-level) | 0.911 ± 0.002 | 0.92 | 9.9 | 0.781 ± 0.004 | 0.914 | 0.666 "
        "| -0.009 ± 0.004 (-0.016 to -0.001) | 0.109 ± 0.005 (0.095 to 0.124) |",
        "| **that help by what they say (gain and content)** | 0.903 ± 0.003 | 0.37 | 6.5 | 0.890 ± 0.003 "
        "| 0.892 | 0.658 |  |  |",
    ],
    "strips-dial": ["| 0 | 0.37 | 6.4 | 0.917 |", "| 10 | 0.00 | 0.0 | 0.660 |"],
    "reasoning": [
        "| 2 CPU cores, one query alone | never | auto | always | auto against always |",
        "| nano: hit@1 | 0.725 | 0.885 | 0.900 | -0.015 |",
        "| nano: reasoning rate / rationale tokens | 0.00 / 0.0 | 0.21 / 4.7 | 1.00 / 14.1 |  |",
        "| nano: p50 / p95 / p99, ms | 2.63 / 5.23 / 6.25 | 2.45 / 21.82 / 25.58 | 9.98 / 22.39 / 25.59 "
        "| 0.25x at p50 |",
        "| nano: a second of random arrivals, p95 below 120 ms | 685 | 486 | 329 | 1.48x |",
        "| 0.2B int8: mean, ms | 190 | 297 | 668 | 0.44x |",
        "| 0.2B int8: of it prefill / decode | 186 / 0 | 186 / 106 | 186 / 472 |  |",
        "| 0.2B int8: a second, in batches of 32 | 4.7 | 3.8 | 2.9 | 1.32x |",
    ],
    "precisions": [
        "| float32 | 6.1 | 1 - 1e-11 / 1 - 1e-11 | 1 - 1e-11 | 100.00% | 0 | all | 0.795 / 0.915 / 0.922 |",
        "| int8 | 2.0 | 0.9994 / 0.9996 | 1 - 1e-11 | 99.93% | 0 | 2 | 0.792 / 0.917 / 0.912 |",
        "| int8, generator int4 | 2.6 | 0.9990 / 0.9982 | 1 - 1e-6 | 99.58% | 1 | 1 | 0.787 / 0.917 / 0.920 |",
        "| int4 | 1.4 | 0.9941 / 0.9974 | 1 - 1e-5 | 99.42% | 1 | 1 | 0.785 / 0.912 / 0.912 |",
    ],
    "peers": [
        "| 0.2B: transformers, seconds | 0.64 to 0.70 | 4.7 to 5.4 | 2.5 to 2.6 | 12.3 to 13.8 |",
        "| transformers, eager / compiled | 1.03x / 0.95x | 1.11x / 1.09x | 0.99x / 1.01x | 1.03x / 1.04x |",
        "| sentence-transformers | 1.04x | 1.01x | - | - |",
        "| OpenVINO, 8-bit weights / GenAI's pipeline | 5.4x / 4.8x | 4.9x / 5.1x | - | - |",
        "| llama.cpp, float32 / 8-bit | 0.5x / 0.8x | 0.5x / 0.7x | 1.2x / 1.8x | 0.8x / 1.1x |",
        "| **fused int8** | 5.6x to 5.8x | 4.7x to 5.2x | 7.5x to 8.0x | 8.7x to 9.6x |",
    ],
    "loops": ["| two-route: auto | 497 | 20 | 0.922 |  |", "| static: auto | 404 | 71 | 0.923 | 1.23x |"],
    "loops-tight": ["| two-route: auto | 239 | 12 | 0.927 |  |", "| static: auto | 135 | 20 | 0.935 | 1.77x |"],
    "loops-small": ["| two-route: auto | 20.4 | 433 | - |  |", "| static: auto | 19.5 | 1694 | - | 1.05x |"],
    "servers": [
        "| mmemb serve: never | 32.5 | 494 | - |  |",
        "| vLLM for CPUs bfloat16: never | 26.6 | 335 | - | 1.22x |",
    ],
    "overlap": ["| nothing ahead | 1.46 | 1.00x | 23% |", "| rows ahead | 1.71 | 1.17x | 1% |"],
    "memory": [
        "| 1,000,000, a stand-in for the engine | 95 | 110 | 609 |",
        "| 30,000, embedded by nano | 97 | 145 | 18 |",
    ],
    "scale": [
        "| samples: MB of memory, mapped | 0.1 | 1.1 | 5.9 | 23.5 |",
        "| samples: MB of memory, as a list | 23 | 266 | 681 | 2,745 |",
        "| mining: queries a second / comparing all | 6,256 / 8,839 | 783 / 964 | 2,444 / 323 | 936 / 71 |",
    ],
    "search": [
        "| numpy: ms, a query alone | 0.37 | 2.80 | 29.52 | 1.99 | 16.50 |",
        "| index + float32 | 1.000, 1.1x | 1.000, 4.9x | 1.000, 24.8x | 1.000, 1.4x | 1.000, 6.4x |",
    ],
    "overload": [
        "| 1 | 487 | 0.84 | 0.21 | 0.906 | 0.787 | 0.930 | 0.751 / 0.914 | 29 / 97 | 0.4% |",
        "| 2 | 975 | 1.99 | 0.00 | 0.750 | 0.750 | 0.750 | 0.750 / 0.911 | 46 / 91 | 25.1% |",
    ],
    "peers-by-token": [
        "| 0.2B: transformers, seconds | 0.62 | 5.56 | 0.079 | 0.146 |",
        "| fused int8, generator int4 | 5.5x | 5.6x | 8.2x | 4.8x |",
        "| 2B: transformers, seconds | 4.41 | 34.51 | 0.318 | 0.599 |",
        "| 2B, another run: transformers, seconds | 4.63 | 36.19 | 0.299 | 0.449 |",
        "| fused float32 | 2.6x | 2.3x | 2.3x | 1.2x |",
    ],
    "tensorrt-rtx": [
        "| vision | 0.4 / 5.3 | 0.4 / 3.2 | 0.3 / 3.2 | 0.4 / 3.7 | 0.4 / 3.6 | 0.4 / 2.8 |",
        "| embedder | 3.1 / 18.9 | 2.6 / 17.1 | 2.4 / 17.2 | 2.3 / 20.3 | 2.4 / 21.7 | 2.9 / 17.3 |",
        "| parsed and built for | all four | all four | all four | all four | sm89, sm120 | all four |",
    ],
}


def test_every_table_is_made_of_the_committed_results() -> None:
    assert tables(RESULTS).keys() == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_table_holds_the_figures_and_says_where_they_are_from(name: str) -> None:
    made = tables(RESULTS)[name]
    lines = made.markdown.splitlines()
    assert [row for row in ROWS[name] if row not in lines] == []
    assert lines[1] == "|---" * len(made.head) + "|"
    assert {len(row) for row in made.rows} == {len(made.head)}
    assert made.caption.startswith("2026-11-")
    assert "`mmemb " in made.caption or "`python benchmarks/" in made.caption


def test_the_headline_is_of_nano() -> None:
    made = headline(RESULTS)
    assert made.markdown.splitlines() == [
        "| nano | never | auto | always |",
        "|---|---|---|---|",
        "| hit@1 | 0.725 | 0.885 | 0.900 |",
        "| reasoning rate | 0.00 | 0.21 | 1.00 |",
        "| rationale tokens | 0.0 | 4.7 | 14.1 |",
        "| mean ms alone | 2.79 | 5.37 | 11.38 |",
        "| requests a second, in batches of 32 | 1050 | 808 | 530 |",
        "| random arrivals a second, p95 below 120 ms | 685 | 486 | 329 |",
    ]
    assert made.caption.startswith("2026-11-30; Intel(R) Xeon(R) Processor, 2 cores; `mmemb bench latency")


def test_of_two_results_the_later_counts_and_without_one_there_is_no_table(tmp_path: Path) -> None:
    old = RESULTS / "2026-11-25-precisions-cpu.json"
    shutil.copy(old, tmp_path)
    later = json.loads(old.read_text())
    later["bundles"]["int4"]["onnx_bytes"] = 9e6
    (tmp_path / "2026-12-01-precisions-cpu.json").write_text(json.dumps(later))
    made = tables(tmp_path)
    assert list(made) == ["precisions"]
    assert "| int4 | 9.0 |" in made["precisions"].markdown
    with pytest.raises(OptionError, match="latency-nano-cpu and load-nano-cpu"):
        headline(tmp_path)


def test_a_result_that_lacks_a_figure_is_named(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "2026-11-23-digitchain-cpu.json").read_text())
    del content["runs"][1]["families"]["chain-3"]["auto"]
    (tmp_path / "2026-11-23-digitchain-cpu.json").write_text(json.dumps(content))
    with pytest.raises(OptionError, match=r"digitchain-cpu\.json: not a whole result: KeyError\('auto'\)"):
        tables(tmp_path)


def test_tables_need_nothing_that_draws() -> None:
    code = "import sys, mmemb_benchmarks.report.tables; print(sorted({'matplotlib', 'jinja2'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
