"""Quality against latency over the gate's threshold, between a gate that draws lots and one that knows the outcome.

Axes: Q pairs, 2 the routes (without, with reasoning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_benchmarks.startup import timed
from mmemb_benchmarks.traffic import Traffic
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.calibration import THRESHOLDS
from mmemb_deploy.evaluation.pairs import Judge, encode_queries

RATES = np.linspace(0, 1, 21)  # of reasoning, that the random and the oracle gate are shown at
WARM_UP = 4  # pairs
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """What one way to choose gives: means over the pairs, the latency that of a query alone."""

    threshold: float | None  # None where it is no gate's score that chooses
    reasoning_rate: float
    hit_at_1: float
    latency_ms: float
    rationale_tokens: float


@dataclass(frozen=True)
class Routes:
    """Both routes of every pair: hits (2, Q), milliseconds alone (2, Q), rationale tokens and gate scores (Q,)."""

    hits_2Q: Floats
    milliseconds_2Q: Floats
    tokens_Q: Floats
    scores_Q: Floats

    def point(self, reasons_Q: Floats, threshold: float | None = None) -> Point:
        """Return what follows where each pair reasons with this probability."""

        def mean(routes_2Q: Floats) -> float:
            return float(((1 - reasons_Q) * routes_2Q[0] + reasons_Q * routes_2Q[1]).mean())

        tokens_2Q = np.stack([np.zeros_like(self.tokens_Q), self.tokens_Q])
        return Point(
            threshold, float(reasons_Q.mean()), mean(self.hits_2Q), mean(self.milliseconds_2Q), mean(tokens_2Q)
        )

    def gate(self, threshold: float) -> Point:
        """Return what the gate gives at a threshold."""
        return self.point((self.scores_Q >= threshold).astype(np.float64), threshold)

    def random(self, rate: float) -> Point:
        """Return what drawing lots gives: its expectation."""
        return self.point(np.full_like(self.scores_Q, rate))

    def oracle(self, rate: float) -> Point:
        """Return what choosing by the outcome gives: pairs that gain first, those that lose last, the cheap before."""
        gain_Q = self.hits_2Q[1] - self.hits_2Q[0]
        order = np.lexsort((self.milliseconds_2Q[1], -gain_Q))
        reasons_Q = np.zeros_like(gain_Q)
        reasons_Q[order[: round(rate * len(order))]] = 1
        return self.point(reasons_Q)


def measure_routes(embedder: Embedder, traffic: Traffic, report: Callable[[str], None]) -> Routes:
    """Embed every query alone by both routes, in turns. Raises OptionError for requests without candidates."""
    if not traffic.judged:
        raise OptionError(f"{traffic.source} says nothing about quality: pass pairs, as mmemb calibrate takes them")
    report("embedding candidates")
    judge = Judge(embedder, traffic.pairs)
    report("embedding queries")
    modes = "never", "always"
    rows: dict[str, list[Any]] = {mode: [] for mode in modes}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for place, pair in [*enumerate(traffic.pairs[:WARM_UP]), *enumerate(traffic.pairs)]:
        for mode in modes if place % 2 else reversed(modes):
            encoded, took = timed(encode_queries, embedder, [pair], reasoning=mode)
            rows[mode].append(encoded)
            seconds[mode].append(took)
    warm = len(rows["never"]) - len(traffic.pairs)
    never, always = ([encoded.details[0] for encoded in rows[mode][warm:]] for mode in modes)
    hits = [judge.hits(np.concatenate([encoded.embeddings_QD for encoded in rows[mode][warm:]])) for mode in modes]
    return Routes(
        hits_2Q=np.array(hits, np.float64),
        milliseconds_2Q=1000 * np.array([seconds[mode][warm:] for mode in modes]),
        tokens_Q=np.array([detail.rationale_tokens for detail in always], np.float64),
        scores_Q=np.array([detail.gate_score for detail in never], np.float64),
    )


def frontier(routes: Routes, threshold: float) -> dict[str, Any]:
    """Return the gate's curve, each rate once, with the two controls and the default threshold's point."""
    curve = _by_rate(routes.gate(value) for value in (*THRESHOLDS, threshold, 1.0 + 1e-9))
    return {
        "pairs": len(routes.scores_Q),
        "threshold": threshold,
        "default": asdict(routes.gate(threshold)),
        "always_hit_at_1": float(routes.hits_2Q[1].mean()),
        "curve": [asdict(point) for point in curve],
        "random": [asdict(routes.random(rate)) for rate in RATES],
        "oracle": [asdict(routes.oracle(rate)) for rate in RATES],
    }


def _by_rate(points: Iterable[Point]) -> list[Point]:
    """Return one point of each rate, the rates rising."""
    found = {point.reasoning_rate: point for point in points}
    return [found[rate] for rate in sorted(found)]
