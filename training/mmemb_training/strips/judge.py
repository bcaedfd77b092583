"""A judge that errs, as one of a real size does: what it makes of what the evaluator found.

    gain    = +- gain    + n + FORM where the rationale is well formed      the sign is flipped for a share FLIPPED
    content = +- content + n - n'                                           n, n' ~ N(0, SPREAD), as of two readings

A published router found about 15% of rationales to help by a judge and to harm in truth (SURE, arXiv 2609.29560).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmemb_training.selection.select import Assessed

SPREAD = 1.0  # nats
FORM = 0.5  # nats that a rationale of several statements earns by its looks
FLIPPED = 0.15


def noisy(assessed: Sequence[Assessed], seed: int) -> list[Assessed]:
    """Return what the judge says of assessed rationales, a function of their order and the seed."""
    rng = np.random.default_rng([seed, len(assessed)])
    signs, (first, second) = (
        np.where(rng.random(len(assessed)) < FLIPPED, -1, 1),
        rng.normal(0, SPREAD, (2, len(assessed))),
    )
    return [
        replace(
            one,
            gain=float(sign * one.gain + n + FORM * well_formed(one.rationale.text)),
            content=float(sign * one.content + n - other),
        )
        for one, sign, n, other in zip(assessed, signs, first, second, strict=True)
    ]


def well_formed(rationale: str) -> bool:
    """Return whether a rationale looks like reasoning: two statements or more."""
    return rationale.count(";") > 1


def auc(judged: Sequence[Assessed], true: Sequence[Assessed], margin: float) -> float:
    """Return how often the judge ranks a rationale that helps by more than `margin` above one that does not."""
    gains = np.array([one.gain for one in judged])
    helps = np.array([one.gain > margin for one in true])
    ranks = gains.argsort().argsort() + 1
    above = ranks[helps].sum() - helps.sum() * (helps.sum() + 1) / 2
    return float(above / max(1, helps.sum() * (~helps).sum()))
