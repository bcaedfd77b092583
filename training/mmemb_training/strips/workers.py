"""Three workers that write rationales for strips, none of them right about everything, and how a rationale reads.

Each believes some single steps wrongly, always in the same way, and no two believe the same ones wrongly: of chains of
two to five digits they have 80%, 65% and 51% right. Each now and then answers another aspect of the strip than the one
asked for, truthfully: what is said is right, and no use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.evaluation.digitchain import OPERATORS, apply_operator
from mmemb_training.pool.workers import Written
from mmemb_training.samples import Question
from mmemb_training.strips.questions import Strip

Step = Callable[[int, str, int], int]  # left, operator, right

BELIEVED_WRONGLY = {"able": 0.1, "middling": 0.18, "weak": 0.28}  # shares of the single steps, by worker
OFF_ASPECT = 0.25  # share of what is written that answers another aspect
ASPECTS = ("result", "evens", "first")  # that are answered in place of another
_SEED = 23


def write(aspect: str, strip: Strip, step: Step = apply_operator) -> str:
    """Return a rationale that answers an aspect of a strip, with single steps as `step` has them."""
    digits = strip.digits
    if aspect == "first":
        return f"first {digits[0]};"
    if aspect == "same":
        return f"drawn {' '.join(map(str, digits))};"
    if aspect == "evens":
        even = [str(digit) for digit in digits if digit % 2 == 0]
        return f"even {' '.join(even)}: {len(even)};"
    result = digits[0]
    said = f"it is {result};" if not strip.operators else str(result)
    for operator, right in zip(strip.operators, digits[1:], strict=True):
        result = step(result, operator, right)
        said += f"{operator}{right}={result};"
    return said


def empty(rationale: str) -> str:
    """Return a rationale's form without its content: no digit is named."""
    return re.sub(r"\d", "?", rationale)


def states_only_truths(rationale: str, strip: Strip) -> bool:
    """Judge a rationale by itself, as instance-level selection does: is it right of the strip, whatever was asked?"""
    return rationale in {write(aspect, strip) for aspect in (*ASPECTS, "same")}


class StripWorker:
    """Writes rationales from what a question shows, of which it is told by the question's key."""

    def __init__(self, name: str, told: Mapping[str, Strip], seed: int) -> None:
        self.name = name
        self.samples = 1
        self._told = told
        self._seed = seed

    def write(self, questions: Sequence[Question]) -> list[Written]:
        """Write one candidate for every question; which of them are off the aspect is drawn by the worker's name."""
        rng = np.random.default_rng([self._seed, list(BELIEVED_WRONGLY).index(self.name), _SEED])
        return [Written((self._one(self._told[question.key], rng),), None) for question in questions]

    def _one(self, strip: Strip, rng: np.random.Generator) -> str:
        if rng.random() < OFF_ASPECT:
            others = [aspect for aspect in ASPECTS if aspect != strip.aspect]
            return write(others[rng.integers(len(others))], strip)
        return write(strip.aspect, strip, self.step)

    def step(self, left: int, operator: str, right: int) -> int:
        """Return what this worker believes of a single step."""
        off = _beliefs()[self.name][list(OPERATORS).index(operator), left, right]
        return (apply_operator(left, operator, right) + int(off)) % 10


def strip_workers(told: Mapping[str, Strip], seed: int) -> list[StripWorker]:
    """Return the three workers."""
    return [StripWorker(name, told, seed) for name in BELIEVED_WRONGLY]


@cache
def _beliefs() -> dict[str, NDArray[np.int64]]:
    """Return, by worker, by how much a step of (operator, left, right) is off; no step is off for two workers."""
    rng = np.random.default_rng(_SEED)
    cells = (len(OPERATORS), 10, 10)
    place = rng.permutation(np.prod(cells)).reshape(cells) / np.prod(cells)
    found, start = dict[str, NDArray[np.int64]](), 0.0
    for name, share in BELIEVED_WRONGLY.items():
        wrong = (start <= place) & (place < start + share)
        found[name], start = np.where(wrong, rng.integers(1, 10, cells), 0), start + share
    return found
