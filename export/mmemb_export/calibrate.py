"""The gate's curve: what every threshold gives on held-out pairs, and the default that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.bundle import CurvePoint, GateFacts
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation import Judge, Pair, encode_queries
from mmemb_deploy.results import Detail

THRESHOLDS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, *np.arange(0.1, 1.0, 0.05).round(2).tolist(), 0.97, 0.99, 1.0)
TOLERANCE = 0.005  # of hit@1 over all pairs: how far below the best of the curve the default threshold may be
GROUP_TOLERANCE = 0.0025  # of a group's hit@1: how far below its reference
TIMED_PAIRS = 64  # embedded one by one for the expected latency
UNCALIBRATED = GateFacts(threshold=0.5, calibration="none", curve=())


def calibrate(embedder: Embedder, pairs: Sequence[Pair], name: str) -> GateFacts:
    """Measure the curve and choose the default threshold, by `default_threshold`."""
    judge = Judge(embedder, pairs)
    never, always = (encode_queries(embedder, pairs, reasoning=mode) for mode in ("never", "always"))
    hits_2Q = np.stack([judge.hits(never.embeddings_QD), judge.hits(always.embeddings_QD)])
    scores_Q = np.array([detail.gate_score for detail in never.details])
    tokens_Q = np.array([detail.rationale_tokens for detail in always.details])
    groups_Q = np.array([pair.group for pair in pairs])
    timed = list(islice(range(0, len(pairs), max(1, len(pairs) // TIMED_PAIRS)), TIMED_PAIRS))
    seconds_2T = np.array([_seconds(embedder, [pairs[place] for place in timed], mode) for mode in ("never", "always")])
    reasons = [scores_Q >= threshold for threshold in THRESHOLDS]
    quality = [np.where(reasons_Q, hits_2Q[1], hits_2Q[0]) for reasons_Q in reasons]
    groups = [groups_Q == group for group in sorted(set(groups_Q.tolist()))]
    references = [_reference(hits_2Q[:, members]) for members in groups]
    worst_group = [
        min(hits_Q[members].mean() - reference for members, reference in zip(groups, references, strict=True))
        for hits_Q in quality
    ]
    curve = tuple(
        CurvePoint(
            threshold=threshold,
            reasoning_rate=float(reasons_Q.mean()),
            quality=float(hits_Q.mean()),
            worst_group=float(worst),
            rationale_tokens=float((tokens_Q * reasons_Q).mean()),
            latency_ms=1000 * float(np.where(reasons_Q[timed], seconds_2T[1], seconds_2T[0]).mean()),
        )
        for threshold, reasons_Q, hits_Q, worst in zip(THRESHOLDS, reasons, quality, worst_group, strict=True)
    )
    return GateFacts(threshold=default_threshold(curve), calibration=name, curve=curve)


def default_threshold(curve: Sequence[CurvePoint]) -> float:
    """Return the largest threshold whose quality is within TOLERANCE of the curve's best, and good in every group.

    The first rule is METHOD's; the second is ours: a threshold that is good on average may still spoil a small group,
    so each group must stay within GROUP_TOLERANCE of its reference. Where no threshold satisfies both, the one that
    spoils its worst group least wins, the largest of equals.
    """
    best = max(point.quality for point in curve)
    good = [point for point in curve if point.quality >= best - TOLERANCE and point.worst_group >= -GROUP_TOLERANCE]
    if good:
        return max(point.threshold for point in good)
    return max(curve, key=lambda point: (point.worst_group, point.threshold)).threshold


def _reference(hits_2M: NDArray[np.bool_]) -> float:
    """Return what a group of pairs must reach, from its hits without and with reasoning.

    That is hit@1 with reasoning where reasoning is better by more than two standard errors, and without it elsewhere:
    reasoning has to earn its cost.
    """
    gain_M = hits_2M[1].astype(np.float64) - hits_2M[0]
    earned = gain_M.mean() > 2 * gain_M.std() / np.sqrt(len(gain_M))
    return float(hits_2M[int(earned)].mean())


def _seconds(embedder: Embedder, pairs: Sequence[Pair], reasoning: str) -> list[float]:
    """Return the seconds each pair's query takes alone."""
    details: list[Detail] = []
    for pair in pairs:
        details += encode_queries(embedder, [pair], reasoning=reasoning).details
    return [detail.timings.total for detail in details]
