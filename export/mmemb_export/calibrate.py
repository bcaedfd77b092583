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
TOLERANCE = 0.005  # of hit@1: how far below the best of the curve the default threshold may be
TIMED_PAIRS = 64  # embedded one by one for the expected latency
UNCALIBRATED = GateFacts(threshold=0.5, calibration="none", curve=())


def calibrate(embedder: Embedder, pairs: Sequence[Pair], name: str) -> GateFacts:
    """Measure the curve and choose the default threshold: the largest whose quality is within TOLERANCE of the best.

    The tolerance holds for all pairs together and for every group of them, since a default that is good on average may
    still spoil a small group. Where no threshold satisfies every group, the one that spoils its worst group least wins.
    """
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
    in_group = {"all": np.ones(len(pairs), bool)} | {str(group): groups_Q == group for group in set(groups_Q.tolist())}
    by_group = np.array([[hits_Q[members].mean() for members in in_group.values()] for hits_Q in quality])
    shortfall = (by_group - by_group.max(axis=0)).min(axis=1)
    curve = tuple(
        CurvePoint(
            threshold=threshold,
            reasoning_rate=float(reasons_Q.mean()),
            quality=float(hits_Q.mean()),
            worst_group=float(short),
            rationale_tokens=float((tokens_Q * reasons_Q).mean()),
            latency_ms=1000 * float(np.where(reasons_Q[timed], seconds_2T[1], seconds_2T[0]).mean()),
        )
        for threshold, reasons_Q, hits_Q, short in zip(THRESHOLDS, reasons, quality, shortfall, strict=True)
    )
    return GateFacts(threshold=default_threshold(THRESHOLDS, shortfall), calibration=name, curve=curve)


def default_threshold(thresholds: Sequence[float], shortfall: NDArray[np.float64]) -> float:
    """Return the largest threshold whose shortfall (0 or less) is within TOLERANCE, or else the least shortfall."""
    allowed = min(-TOLERANCE, float(shortfall.max()))
    return max(threshold for threshold, short in zip(thresholds, shortfall, strict=True) if short >= allowed - 1e-12)


def _seconds(embedder: Embedder, pairs: Sequence[Pair], reasoning: str) -> list[float]:
    """Return the seconds each pair's query takes alone."""
    details: list[Detail] = []
    for pair in pairs:
        details += encode_queries(embedder, [pair], reasoning=reasoning).details
    return [detail.timings.total for detail in details]
