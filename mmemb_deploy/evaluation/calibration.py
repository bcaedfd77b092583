"""The gate's curve: what every threshold gives on held-out pairs, and the default threshold that follows from it.

Axes: Q pairs, M members of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.bundle.manifest import CurvePoint, GateFacts
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_deploy.evaluation.routes import Routes, measure_routes

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
    """Both routes of the pairs to calibrate on, and the group of each, whose quality is watched."""

    routes: Routes
    groups_Q: NDArray[np.str_]

    def point(self, threshold: float) -> CurvePoint:
        """Return what one threshold gives."""
        outcome = self.routes.gate(threshold)
        hits_Q = outcome.hits_Q
        names = sorted(set(self.groups_Q.tolist()))
        members = {name: self.groups_Q == name for name in names}
        return CurvePoint(
            threshold=threshold,
            reasoning_rate=float(outcome.reasoned_Q.mean()),
            quality=float(hits_Q.mean()),
            quality_interval=wilson_interval(int(hits_Q.sum()), len(hits_Q)),
            worst_group=min(
                float(hits_Q[members[name]].mean()) - reference_quality(self.routes, members[name], len(names))
                for name in names
            ),
            rationale_tokens=float(outcome.tokens_Q.mean()),
            latency_ms=1000 * float(np.nanmean(outcome.seconds_Q)),
        )


def calibrate(embedder: Embedder, pairs: Sequence[Pair], name: str, target: Target | None = None) -> GateFacts:
    """Measure the curve on held-out pairs and choose the threshold, by `target` or else by `default_threshold`.

    Raises OptionError, naming what can be reached, for a target that no threshold reaches.
    """
    timed = range(0, len(pairs), max(1, len(pairs) // TIMED_PAIRS))[:TIMED_PAIRS]
    routes = measure_routes(embedder, pairs, timed=timed)
    measured = Measured(routes, np.array([pair.group for pair in pairs]))
    curve = [measured.point(threshold) for threshold in THRESHOLDS]
    if target is None:
        return GateFacts(threshold=default_threshold(curve), calibration=name, curve=tuple(curve))
    chosen = meet(target, measured)
    curve = sorted({point.threshold: point for point in (*curve, chosen)}.values(), key=lambda point: point.threshold)
    return GateFacts(threshold=chosen.threshold, calibration=name, curve=tuple(curve))


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
    scores_Q = measured.routes.never.scores_Q
    above_all = np.nextafter(max(1.0, float(scores_Q.max())), 2)
    points = [measured.point(float(score)) for score in np.unique([*scores_Q, above_all])]  # the rate falls

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


def reference_quality(routes: Routes, members_Q: NDArray[np.bool_], groups: int) -> float:
    """Return what a group of pairs must reach, from its hits without and with reasoning.

    That is hit@1 with reasoning where reasoning is better beyond chance, and without it elsewhere: reasoning has to
    earn its cost. Chance is a normal test of the paired difference at 5%, two-sided, for all groups together
    (Bonferroni): one of many groups always looks better.
    """
    never_M, always_M = routes.never.hits_Q[members_Q], routes.always.hits_Q[members_Q]
    gain_M = always_M - never_M
    errors = NormalDist().inv_cdf(1 - CHANCE / (2 * groups))
    earned = gain_M.mean() > errors * gain_M.std() / np.sqrt(len(gain_M))
    return float((always_M if earned else never_M).mean())
