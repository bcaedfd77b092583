"""Which rationales are worth learning: gain, content, verdicts, and what a trainer draws from (METHOD stage 2).

    gain(r)    = l(q, r, t) - l(q, no reasoning, t)                          does reasoning help this pair?
    content(r) = l(q, r, t) - mean over r' of other queries of l(q, r', t)   does what it says help?

The first is the paper's, the second ours: it tells a rationale from one that merely looks like one. The r' are by the
same worker and of the same task, so that they look alike and differ in what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from mmemb_training.pool.build import Rationale
from mmemb_training.recipes.settings import Margins, Unhelped


class Outcome(StrEnum):
    """What selection leaves of a question."""

    KEPT = "kept"  # it has a rationale to learn
    EASY = "easy"  # none was kept, and none was needed: the evaluator finds the pair without
    UNHELPED = "unhelped"  # none was kept although one is needed: all workers failed


class Verdict(StrEnum):
    """What a rationale is to its pair."""

    KEPT = "kept"
    FORMAT_ONLY = "format-only"  # helps, but another query's rationale would as well
    USELESS = "useless"  # changes little
    HARMFUL = "harmful"


@dataclass(frozen=True)
class Assessed:
    """A rationale and what the evaluator found; `found`: it finds the pair without any (`Confidence.found`)."""

    question: str
    task: str
    rationale: Rationale
    gain: float
    content: float
    found: bool

    def verdict(self, margins: Margins) -> Verdict:
        """Return what the rationale is, given what it must exceed."""
        if self.gain < -margins.gain:
            return Verdict.HARMFUL
        if self.gain <= margins.gain:
            return Verdict.USELESS
        return Verdict.KEPT if self.content > margins.content else Verdict.FORMAT_ONLY


@dataclass(frozen=True)
class KeptRationales:
    """The rationales that a question kept, and in what proportion to draw them.

    None kept: it is taught to stop, unless `decides` is False: then its decision is taught nothing.
    """

    texts: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    decides: bool = True

    def draw(self, rng: np.random.Generator) -> str | None:
        """Return one of the rationales, or None where none was kept."""
        return self.texts[rng.choice(len(self.texts), p=self.weights)] if self.texts else None


Keeps = Callable[[Assessed], bool]


def kept_rationales(
    assessed: Iterable[Assessed], keeps: Keeps, *, temperature: float, unhelped: Unhelped
) -> dict[str, KeptRationales]:
    """Return what every assessed question kept, drawn in proportion to exp(gain / temperature) (inf: evenly).

    `unhelped` says what a question is taught that no rationale helped although it needs one: "stop", or to decide
    nothing, "undecided".
    """
    kept: dict[str, list[Assessed]] = {}
    lost = set[str]()
    for one in assessed:
        kept.setdefault(one.question, [])
        if keeps(one):
            kept[one.question].append(one)
        if not one.found:
            lost.add(one.question)
    found = {}
    for question, members in kept.items():
        gain_K = np.array([member.gain for member in members]) / temperature
        odds_K = np.exp(gain_K - gain_K.max(initial=-np.inf))
        weights = tuple((odds_K / odds_K.sum()).tolist()) if members else ()
        decides = bool(members) or unhelped == "stop" or question not in lost
        found[question] = KeptRationales(tuple(member.rationale.text for member in members), weights, decides)
    return found


def report(assessed: Iterable[Assessed], margins: Margins) -> dict[str, dict[str, dict[str, int]]]:
    """Count the verdicts, and what is left of questions, by task.

    {"worker": {name: {verdict: count}}, "task": {name: {verdict: count}}, "questions": {task: {outcome: count}}}
    """
    counts: dict[str, dict[str, dict[str, int]]] = {"worker": {}, "task": {}, "questions": {}}
    outcomes: dict[tuple[str, str], Outcome] = {}
    for one in assessed:
        verdict, question = one.verdict(margins), (one.task, one.question)
        if verdict is Verdict.KEPT:
            outcomes[question] = Outcome.KEPT
        outcomes.setdefault(question, Outcome.EASY if one.found else Outcome.UNHELPED)
        for kind, name in (("worker", one.rationale.worker), ("task", one.task)):
            row = counts[kind].setdefault(name, dict.fromkeys(map(str, Verdict), 0))
            row[verdict] += 1
    for (task, _), outcome in outcomes.items():
        counts["questions"].setdefault(task, dict.fromkeys(map(str, Outcome), 0))[outcome] += 1
    return counts
