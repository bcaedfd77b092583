"""Latency with and without reasoning: never, auto and always on the same requests, in turns, in one run.

Axes: R rounds, Q requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.measure.ceiling import Ceiling, Reached
from mmemb_benchmarks.timing import STAGES, Spent, timed
from mmemb_benchmarks.workload import Workload, prompt_tokens
from mmemb_deploy.bundle.work import Work
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import Encoded, Judge, encode_alone, encode_queries
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.routing.router import Route

WARM_UP = 4  # requests, in every mode


class ModeLatency(BaseModel, frozen=True):
    """What one mode took and did, of requests alone where nothing else is said."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    p50_ms_spread: tuple[float, float]  # of the rounds' medians
    throughput_per_s: float  # in batches
    reasoning_rate: float
    rationale_tokens: float
    hit_at_1: float | None  # None where nothing says which embedding is right
    joules_per_request: float | None  # of the GPU, in batches; None without one
    stages_ms: dict[str, float]


class LatencyResult(BaseModel, frozen=True):
    """`mmemb bench latency`."""

    source: str
    batch_size: int
    requests: int
    rounds: int
    ceiling: Reached
    modes: dict[str, ModeLatency]


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
    workload: Workload,
    options: Mapping[str, EncodeOptions],
    *,
    ceiling: Ceiling,
    work: Mapping[str, Work],
    rounds: int,
    batch_size: int,
    joules: Callable[[], float] | None,
    report: Callable[[str], None],
) -> LatencyResult:
    """Embed every request alone and then all in batches, in every mode, `rounds` times; the modes take turns.

    `embedder` runs on an engine whose stages add to `spent`; `work` is that of its graphs; `joules` tells what a GPU
    has used. A first, shorter round warms up and is dropped.
    """
    pairs, names = workload.pairs, list(options)
    milliseconds_RQ = {mode: np.empty((rounds, len(pairs))) for mode in names}
    stages_ms = {mode: defaultdict[str, float](float) for mode in names}  # of a request, in the mean
    whole_R, joules_R = ({mode: list[float]() for mode in names} for _ in range(2))  # of all requests in batches
    encoded: dict[str, Encoded] = {}
    for _ in encode_alone(embedder, pairs[:WARM_UP], options, warm_up=0):
        pass
    for turn in range(rounds):
        report(f"round {turn + 1} of {rounds}: alone")
        spent.clear()
        for mode, index, alone, seconds in encode_alone(embedder, pairs, options, warm_up=0):
            milliseconds_RQ[mode][turn, index] = 1000 * seconds
            spent["preprocess"] = alone.details[0].timings.preprocess
            spent["other"] = seconds - sum(spent.values())
            for stage in STAGES:
                stages_ms[mode][stage] += 1000 * spent[stage] / milliseconds_RQ[mode].size
            spent.clear()
        first = turn % len(names)
        for mode in (*names[first:], *names[:first]):
            report(f"round {turn + 1} of {rounds}: in batches, {mode}")
            before = joules() if joules else 0.0
            settings: EncodeOptions = {**options[mode], "batch_size": batch_size}
            encoded[mode], seconds = timed(encode_queries, embedder, pairs, **settings)
            whole_R[mode].append(seconds)
            if joules:
                joules_R[mode].append(joules() - before)
    judge = Judge(embedder, pairs) if workload.judged else None
    modes: dict[str, ModeLatency] = {}
    for mode in names:
        details = encoded[mode].details
        medians_R = np.median(milliseconds_RQ[mode], axis=1)
        p50, p95, p99 = np.percentile(milliseconds_RQ[mode], (50, 95, 99))
        modes[mode] = ModeLatency(
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            mean_ms=float(milliseconds_RQ[mode].mean()),
            p50_ms_spread=(medians_R.min(), medians_R.max()),
            throughput_per_s=len(pairs) / float(np.median(whole_R[mode])),
            reasoning_rate=float(np.mean([detail.route is Route.REASON for detail in details])),
            rationale_tokens=float(np.mean([detail.rationale_tokens for detail in details])),
            hit_at_1=None if judge is None else float(judge.hits(encoded[mode].embeddings_QD).mean()),
            joules_per_request=float(np.median(joules_R[mode])) / len(pairs) if joules_R[mode] else None,
            stages_ms=dict(stages_ms[mode]),
        )
    tokens = float(np.mean(prompt_tokens(embedder, workload)))
    return LatencyResult(
        source=workload.source,
        batch_size=batch_size,
        requests=len(pairs),
        rounds=rounds,
        ceiling=_reached(ceiling, work, modes, tokens),
        modes=modes,
    )


def _reached(ceiling: Ceiling, work: Mapping[str, Work], modes: Mapping[str, ModeLatency], tokens: float) -> Reached:
    """Return the shares of the ceiling that prefill and decoding reach alone.

    `tokens` are those of a prompt, in the mean, without a prefix that is remembered.
    """
    never, always = modes["never"], modes["always"]
    operations = tokens * work["embedder"].token_operations + work["embedder"].row_operations
    read = (always.rationale_tokens + PATH_MARKERS) * work["generator"].read_bytes
    return Reached(
        **ceiling.model_dump(),
        prefill_share=operations / (never.stages_ms["prefill"] / 1e3) / (ceiling.matmul_gflop_per_s * 1e9),
        decode_share=read / (always.stages_ms["decode"] / 1e3) / (ceiling.copy_gb_per_s * 1e9),
    )
