"""Latency with and without reasoning: never, auto and always on the same requests, in turns, in one run.

Axes: R rounds, Q requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_benchmarks.ceiling import Ceiling, Work
from mmemb_benchmarks.energy import EnergyMeter
from mmemb_benchmarks.stages import STAGES, Spent
from mmemb_benchmarks.startup import timed
from mmemb_benchmarks.traffic import Traffic
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import Encoded, Judge, Pair, encode_queries
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.routing.router import Route

WARM_UP = 4  # requests, in every mode


@dataclass
class Mode:
    """What one mode took and did."""

    options: EncodeOptions
    seconds_RQ: list[list[float]] = field(default_factory=list)  # of a request alone
    whole_R: list[float] = field(default_factory=list)  # seconds of all requests in batches
    joules_R: list[float] = field(default_factory=list)  # of the GPU, meanwhile; none without a meter
    stages: Spent = field(default_factory=lambda: defaultdict(float))  # seconds of all requests alone
    encoded: Encoded | None = None


def mode_options(threshold: float | None, max_rationale_tokens: int | None) -> dict[str, EncodeOptions]:
    """Return the options of never, auto and always; None leaves a choice to the bundle."""
    options: dict[str, EncodeOptions] = {
        mode: {"reasoning": mode, "max_rationale_tokens": max_rationale_tokens} for mode in ("never", "auto", "always")
    }
    options["auto"]["threshold"] = threshold
    return options


def measure_latency(
    embedder: Embedder,
    spent: Spent,
    traffic: Traffic,
    options: dict[str, EncodeOptions],
    *,
    rounds: int,
    batch_size: int,
    meter: EnergyMeter | None,
    report: Callable[[str], None],
) -> dict[str, Mode]:
    """Embed every request alone and then all in batches, in every mode, `rounds` times; the modes take turns.

    `embedder` runs on an engine whose stages add to `spent`. A first, shorter round warms up and is dropped.
    """
    modes = {name: Mode(settings) for name, settings in options.items()}
    _alone(embedder, spent, traffic.pairs[:WARM_UP], {name: Mode(settings) for name, settings in options.items()})
    for turn in range(rounds):
        report(f"round {turn + 1} of {rounds}: alone")
        _alone(embedder, spent, traffic.pairs, modes)
        for name, mode in _rotated(modes, turn):
            report(f"round {turn + 1} of {rounds}: in batches, {name}")
            before = None if meter is None else meter.joules()
            settings: EncodeOptions = {**mode.options, "batch_size": batch_size}
            mode.encoded, seconds = timed(encode_queries, embedder, traffic.pairs, **settings)
            mode.whole_R.append(seconds)
            if meter is not None and before is not None:
                mode.joules_R.append(meter.joules() - before)
    return modes


def summarise(
    modes: dict[str, Mode], judge: Judge | None, ceiling: Ceiling, work: dict[str, Work], tokens_Q: Sequence[int]
) -> dict[str, Any]:
    """Return what the modes took, and the shares of the ceiling that prefill and decoding reach alone.

    `tokens_Q` are the prompt's tokens of each request, without those of a head that is remembered.
    """
    always, never = modes["always"], modes["never"]
    assert always.encoded is not None
    rounds, requests = len(never.seconds_RQ), len(tokens_Q)
    embedder, generator = work["embedder"], work["generator"]
    operations = rounds * (sum(tokens_Q) * embedder.token_operations + requests * embedder.row_operations)
    steps = rounds * sum(detail.rationale_tokens + PATH_MARKERS for detail in always.encoded.details)
    return {
        "requests": requests,
        "rounds": rounds,
        "ceiling": {
            "copy_gb_per_s": ceiling.copy_bytes / 1e9,
            "matmul_gflop_per_s": ceiling.operations / 1e9,
            "matmul_type": ceiling.product,
            "prefill_share": operations / never.stages["prefill"] / ceiling.operations,
            "decode_share": steps * generator.weight_bytes / always.stages["decode"] / ceiling.copy_bytes,
        },
        "modes": {name: _summary(mode, judge) for name, mode in modes.items()},
    }


def _summary(mode: Mode, judge: Judge | None) -> dict[str, Any]:
    assert mode.encoded is not None
    milliseconds_RQ: NDArray[np.float64] = 1000 * np.array(mode.seconds_RQ)
    medians_R = np.median(milliseconds_RQ, axis=1)
    p50, p95, p99 = np.percentile(milliseconds_RQ, (50, 95, 99))
    details, requests = mode.encoded.details, milliseconds_RQ.shape[1]
    return {
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "mean_ms": milliseconds_RQ.mean(),
        "p50_ms_spread": [medians_R.min(), medians_R.max()],
        "throughput_per_s": requests / float(np.median(mode.whole_R)),
        "reasoning_rate": float(np.mean([detail.route is Route.REASON for detail in details])),
        "rationale_tokens": float(np.mean([detail.rationale_tokens for detail in details])),
        "hit_at_1": None if judge is None else float(judge.hits(mode.encoded.embeddings_QD).mean()),
        "joules_per_request": float(np.median(mode.joules_R)) / requests if mode.joules_R else None,
        "stages_ms": {stage: 1000 * mode.stages[stage] / milliseconds_RQ.size for stage in STAGES},
    }


def _alone(embedder: Embedder, spent: Spent, pairs: Sequence[Pair], modes: dict[str, Mode]) -> None:
    for mode in modes.values():
        mode.seconds_RQ.append([])
    for place, pair in enumerate(pairs):
        for _, mode in _rotated(modes, place):
            spent.clear()
            encoded, seconds = timed(encode_queries, embedder, [pair], **mode.options)
            mode.seconds_RQ[-1].append(seconds)
            spent["preprocess"] = encoded.details[0].timings.preprocess
            spent["other"] = seconds - sum(spent.values())
            for stage in STAGES:
                mode.stages[stage] += spent[stage]


def _rotated(modes: dict[str, Mode], turn: int) -> list[tuple[str, Mode]]:
    """Return the modes in an order that each turn begins with another."""
    named = list(modes.items())
    first = turn % len(named)
    return [*named[first:], *named[:first]]
