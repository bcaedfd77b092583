"""The gate's curve: what every threshold gives on held-out pairs, and the default threshold that follows from it.

Axes: Q pairs, T timed pairs, 2 the routes (without, with reasoning), M members of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.bundle.manifest import CurvePoint, GateFacts
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.pairs import Judge, Pair, encode_queries

THRESHOLDS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, *np.arange(0.1, 1.0, 0.05).round(2).tolist(), 0.97, 0.99, 1.0)
TOLERANCE = 0.005  # of hit@1 over all pairs: how far below the best of the curve the default threshold may be
GROUP_TOLERANCE = 0.005  # of a group's hit@1: how far below its reference
ROUNDING = 1e-9
TIMED_PAIRS = 64  # embedded one by one for the expected latency
NORMAL_95 = 1.96  # standard deviations that hold 95% of a normal distribution
CHANCE = 0.05  # of finding reasoning better, in any group, where it is not

Budget = Literal["reasoning_rate", "latency_ms", "quality"]


@dataclass(frozen=True)
class Target:
    """What a user asks of the threshold: at most a `reasoning_rate` or `latency_ms`, or at least a `quality`."""

    budget: Budget
    value: float


@dataclass(frozen=True)
class Measured:
    """Both routes of every pair: hits (2, Q), gate scores, rationale tokens, and the seconds (2, T) of some alone."""

    hits_2Q: NDArray[np.bool_]
    scores_Q: NDArray[np.float64]
    tokens_Q: NDArray[np.int64]
    timed_T: NDArray[np.int64]
    seconds_2T: NDArray[np.float64]
    groups: tuple[NDArray[np.bool_], ...]  # members of each group of pairs, (Q,)

    def point(self, threshold: float) -> CurvePoint:
        """Return what one threshold gives."""
        reasons_Q = self.scores_Q >= threshold
        hits_Q = np.where(reasons_Q, self.hits_2Q[1], self.hits_2Q[0])
        seconds_T = np.where(reasons_Q[self.timed_T], self.seconds_2T[1], self.seconds_2T[0])
        return CurvePoint(
            threshold=threshold,
            reasoning_rate=float(reasons_Q.mean()),
            quality=float(hits_Q.mean()),
            quality_interval=wilson_interval(int(hits_Q.sum()), len(hits_Q)),
            worst_group=min(
                float(hits_Q[members].mean()) - _reference(self.hits_2Q[:, members], len(self.groups))
                for members in self.groups
            ),
            rationale_tokens=float((self.tokens_Q * reasons_Q).mean()),
            latency_ms=1000 * float(seconds_T.mean()),
        )


def calibrate(embedder: Embedder, pairs: Sequence[Pair], name: str, target: Target | None = None) -> GateFacts:
    """Measure the curve on held-out pairs and choose the threshold, by `target` or else by `default_threshold`.

    Raises OptionError, naming what can be reached, for a target that no threshold reaches.
    """
    measured = measure(embedder, pairs)
    curve = [measured.point(threshold) for threshold in THRESHOLDS]
    if target is None:
        return GateFacts(threshold=default_threshold(curve), calibration=name, curve=tuple(curve))
    chosen = meet(target, measured)
    curve = sorted({point.threshold: point for point in (*curve, chosen)}.values(), key=lambda point: point.threshold)
    return GateFacts(threshold=chosen.threshold, calibration=name, curve=tuple(curve))


def measure(embedder: Embedder, pairs: Sequence[Pair]) -> Measured:
    """Embed the queries of pairs by both routes, and some of them alone for their latency."""
    judge = Judge(embedder, pairs)
    never, always = (encode_queries(embedder, pairs, reasoning=mode) for mode in ("never", "always"))
    names_Q = np.array([pair.group for pair in pairs])
    timed = list(islice(range(0, len(pairs), max(1, len(pairs) // TIMED_PAIRS)), TIMED_PAIRS))
    alone = [pairs[place] for place in timed]
    return Measured(
        hits_2Q=np.stack([judge.hits(never.embeddings_QD), judge.hits(always.embeddings_QD)]),
        scores_Q=np.array([detail.gate_score for detail in never.details]),
        tokens_Q=np.array([detail.rationale_tokens for detail in always.details]),
        timed_T=np.array(timed),
        seconds_2T=np.array([_seconds(embedder, alone, mode) for mode in ("never", "always")]),
        groups=tuple(names_Q == name for name in sorted(set(names_Q.tolist()))),
    )


def default_threshold(curve: Sequence[CurvePoint]) -> float:
    """Return the largest threshold whose quality is within TOLERANCE of the curve's best, and good in every group.

    The first rule is METHOD's; the second is ours: a threshold that is good on average may still spoil a small group,
    so each group must stay within GROUP_TOLERANCE of its reference. Where no threshold satisfies both, the one that
    spoils its worst group least wins, the largest of equals.
    """
    best = max(point.quality for point in curve)
    least = best - TOLERANCE - ROUNDING, -GROUP_TOLERANCE - ROUNDING
    good = [point for point in curve if point.quality >= least[0] and point.worst_group >= least[1]]
    if good:
        return max(point.threshold for point in good)
    return max(curve, key=lambda point: (point.worst_group, point.threshold)).threshold


def meet(target: Target, measured: Measured) -> CurvePoint:
    """Return the point that meets a target: within a budget the one that reasons most, above a quality the least.

    Thresholds are the scores that occurred, and one above them all. Raises OptionError where none meets it.
    """
    above_all = np.nextafter(max(1.0, float(measured.scores_Q.max())), 2)
    points = [measured.point(float(score)) for score in np.unique([*measured.scores_Q, above_all])]  # rate falls

    def value(point: CurvePoint) -> float:
        return float(getattr(point, target.budget))

    if target.budget == "quality":
        met = [point for point in points if point.quality >= target.value]
        if not met:
            best = max(points, key=value)
            raise OptionError(
                f"quality {target.value} is not reached at any threshold: the best on these pairs is "
                f"{best.quality:.4f}, at a reasoning rate of {best.reasoning_rate:.1%}"
            )
        return met[-1]
    met = [point for point in points if value(point) <= target.value]
    if not met:
        least = min(map(value, points))
        raise OptionError(f"{target.budget} {target.value} is not reached at any threshold: the least is {least:.4g}")
    return met[0]


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share: `hits` of `count`."""
    share, z2 = hits / count, NORMAL_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _reference(hits_2M: NDArray[np.bool_], groups: int) -> float:
    """Return what a group of pairs must reach, from its hits without and with reasoning.

    That is hit@1 with reasoning where reasoning is better beyond chance, and without it elsewhere: reasoning has to
    earn its cost. Chance is a normal test of the paired difference at 5%, two-sided, for all groups together
    (Bonferroni): one of many groups always looks better.
    """
    gain_M = hits_2M[1].astype(np.float64) - hits_2M[0]
    errors = NormalDist().inv_cdf(1 - CHANCE / (2 * groups))
    earned = gain_M.mean() > errors * gain_M.std() / np.sqrt(len(gain_M))
    return float(hits_2M[int(earned)].mean())


def _seconds(embedder: Embedder, pairs: Sequence[Pair], reasoning: str) -> list[float]:
    """Return the seconds each pair's query takes alone."""
    return [
        detail.timings.total
        for pair in pairs
        for detail in encode_queries(embedder, [pair], reasoning=reasoning).details
    ]
