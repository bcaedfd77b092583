"""Results of every kind, as `mmemb bench` writes them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

STAMP = {
    "date": "2026-11-23",
    "command": "mmemb bench <kind>",
    "machine": {"device": "a processor, 2 cores", "cores": 2, "memory_bytes": 8e9, "versions": {"numpy": "2.4"}},
    "bundle": {"name": "nano", "precision": "float32", "hash": "1f2e3d4c5b6a79", "backend": "an engine"},
}
STAGES = dict.fromkeys(("preprocess", "vision", "prefill", "gate", "decode", "other"), 0.5)


def mode(p50: float, hits: float | None) -> dict[str, Any]:
    return {
        "p50_ms": p50,
        "p95_ms": 2 * p50,
        "p99_ms": 3 * p50,
        "mean_ms": 1.2 * p50,
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
    "threshold": 0.8,
    "always_hit_at_1": 0.9,
    "default": point(2.0, 0.9, 0.8),
    "curve": [point(1, 0.7, 1.0), point(2, 0.9, 0.8), point(4, 0.9, 0)],
    "random": [point(1, 0.7), point(4, 0.9)],
    "oracle": [point(1, 0.7), point(4, 0.9)],
}
TRIAL = {
    "rate_per_s": 90,
    "p50_ms": 6,
    "p95_ms": 12,
    "p99_ms": 15,
    "completed_per_s": 89,
    "held": True,
    "half_held": True,
}
SUSTAINED = {"idle_ms": 2, "sustainable_per_s": 432.0, "broke_per_s": None, "trials": [TRIAL]}
LOAD = {
    "target_p95_ms": 19.5,
    "seconds": 5,
    "batch_size": 32,
    "source": "DigitChain",
    "ratio": {"auto over always": 2.31},
    "modes": dict.fromkeys(("never", "auto", "always"), SUSTAINED),
}
LEVEL = {"load": 2.0, "trial": {**TRIAL, "hit_at_1": 0.8215, "threshold": 0.9987, "reasoned": 0.08}}
OVERLOAD = {
    "target_p95_ms": 19.5,
    "sustained_per_s": {"auto": 432.0, "always": 187.0},
    "seconds": 60,
    "batch_size": 32,
    "source": "DigitChain",
    "levels": [{**LEVEL, "never": 0.75, "auto": 0.91, "always": 0.9, "random": 0.77, "oracle": 0.8311}],
    "recovery_s": 1.5,
    "deadlines": [
        {
            "deadline_ms": 3.7,
            "times_idle": 1.0,
            "reasoned": 0.6,
            "direct": 0.3,
            "refused": 0.06,
            "late": 0.04,
            "unsaid": 0.0,
            "worst_unsaid_ms": 0.0,
        }
    ],
    "mixed": {
        "rate_per_s": 187,
        "alone_per_s": 400,
        "utilisation": 0.51,
        "p95_ms": 3.33,
        "alone_p95_ms": 2.5,
        "ratio": 1.332,
        "rounds": [(3.33, 2.5)],
    },
}
PEERS = {
    "tokens": 256,
    "prefix_tokens": 20,
    "written": 16,
    "device": "cpu",
    "threads": 2,
    "rounds": 5,
    "baseline": "transformers",
    "left_out": {"vllm": "it needs <a GPU>"},
    "peers": {
        name: {
            "environment": {"numpy": "2.4"},
            "cosine": cosine,
            "seconds": {"embed x1": seconds},
            "spread": {"embed x1": [0.9 * seconds, 1.1 * seconds]},
        }
        for name, cosine, seconds in (("transformers", 1.0, 0.617), ("int8", 0.99907, 0.104))
    },
}


def benchmark(name: str, median: float, **sizes: float) -> dict[str, Any]:
    stats = {"median": median, "q1": 0.95 * median, "q3": 1.05 * median, "rounds": 60}
    return {"name": name, "stats": stats, "extra_info": {"p95": 1.33 * median, **sizes}}


SUITE = {
    "datetime": "2026-11-23T10:00:00",
    "machine_info": STAMP["machine"],
    "bundle": STAMP["bundle"],
    "command": "mmemb bench suite",
    "benchmarks": [benchmark("bench_gate[8]", 0.00685, tokens=8), benchmark("bench_prefill[long text]", 0.5)],
}


@pytest.fixture(scope="session")
def make_results() -> Callable[[], dict[str, Any]]:
    """Make one whole result of every kind, as its file holds it, to be changed at will."""

    def make() -> dict[str, Any]:
        stamped: dict[str, Any] = {
            kind: {**STAMP, "kind": kind, "result": result}
            for kind, result in (
                ("latency", LATENCY),
                ("frontier", FRONTIER),
                ("load", LOAD),
                ("overload", OVERLOAD),
                ("peers", PEERS),
            )
        }
        stamped["peers"]["bundle"] = None
        return copy.deepcopy({**stamped, "suite": SUITE})

    return make


@pytest.fixture
def results_by_kind(make_results: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One whole result of every kind."""
    return make_results()
