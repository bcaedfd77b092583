"""Quality against latency over the gate's threshold, between a gate that draws lots and one that knows the outcome."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.workload import Workload
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.calibration import THRESHOLDS
from mmemb_deploy.evaluation.routes import Outcome, Routes, measure_routes

RATES = np.linspace(0, 1, 21)  # of reasoning, that the random and the oracle gate are shown at


class Point(BaseModel, frozen=True):
    """What one way to choose gives: means over the pairs, the latency that of a query alone."""

    threshold: float | None  # None where it is no gate's score that chooses
    reasoning_rate: float
    hit_at_1: float
    latency_ms: float
    rationale_tokens: float


class FrontierResult(BaseModel, frozen=True):
    """`mmemb bench frontier`: the gate's curve, each rate once, and what two other gates give at RATES."""

    source: str
    pairs: int
    threshold: float
    default: Point  # at the bundle's threshold
    always_hit_at_1: float
    curve: list[Point]
    random: list[Point]
    oracle: list[Point]


def measure_frontier(embedder: Embedder, workload: Workload) -> FrontierResult:
    """Embed every query alone by both routes, in turns, and choose between them in every way.

    Raises OptionError for queries without candidates, and for a bundle without a gate.
    """
    if not workload.judged:
        raise OptionError(f"{workload.source} says nothing about quality: pass pairs, as mmemb calibrate takes them")
    if embedder.manifest.gate is None:
        raise OptionError(f"{embedder.manifest.model.name} does not reason: it has no gate to set")
    routes = measure_routes(embedder, workload.pairs, timed=range(len(workload.pairs)))
    return frontier(routes, embedder.manifest.gate.threshold, workload.source)


def frontier(routes: Routes, threshold: float, source: str) -> FrontierResult:
    """Return the points of some routes; `threshold` is the bundle's."""
    curve = {point.reasoning_rate: point for point in (_gate(routes, at) for at in (*THRESHOLDS, threshold, 1 + 1e-9))}
    return FrontierResult(
        source=source,
        pairs=len(routes.never.hits_Q),
        threshold=threshold,
        default=_gate(routes, threshold),
        always_hit_at_1=float(routes.always.hits_Q.mean()),
        curve=[curve[rate] for rate in sorted(curve)],
        random=[_point(routes.random(rate)) for rate in RATES],
        oracle=[_point(routes.oracle(rate)) for rate in RATES],
    )


def _gate(routes: Routes, threshold: float) -> Point:
    return _point(routes.gate(threshold), threshold)


def _point(outcome: Outcome, threshold: float | None = None) -> Point:
    return Point(
        threshold=threshold,
        reasoning_rate=float(outcome.reasoned_Q.mean()),
        hit_at_1=float(outcome.hits_Q.mean()),
        latency_ms=1000 * float(outcome.seconds_Q.mean()),
        rationale_tokens=float(outcome.tokens_Q.mean()),
    )
