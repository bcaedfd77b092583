"""Which candidates are worth learning: gain, content, verdicts, and what a trainer draws from (METHOD stage 2).

    gain(r)    = l(q, r, t) - l(q, no reasoning, t)                          does reasoning help this pair?
    content(r) = l(q, r, t) - mean over r' of other queries of l(q, r', t)   does what it says help?

The first is the paper's, the second ours: it tells a rationale from one that merely looks like one. The r' are by the
same worker and of the same task, so that they look alike and differ in what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from mmemb_training.pool.job import Candidate
from mmemb_training.recipes.settings import Margins
from mmemb_training.samples import Sample
from mmemb_training.selection.evaluators import Evaluator


class Verdict(StrEnum):
    """What a candidate is to its pair."""

    KEPT = "kept"
    FORMAT_ONLY = "format-only"  # helps, but another query's rationale would as well
    USELESS = "useless"  # changes little
    HARMFUL = "harmful"


@dataclass(frozen=True)
class Judged:
    """A candidate and what the evaluator found."""

    question: str
    task: str
    candidate: Candidate
    gain: float
    content: float

    def verdict(self, margins: Margins) -> Verdict:
        """Return what the candidate is, given what it must exceed."""
        if self.gain < -margins.gain:
            return Verdict.HARMFUL
        if self.gain <= margins.gain:
            return Verdict.USELESS
        return Verdict.KEPT if self.content > margins.content else Verdict.FORMAT_ONLY


def judge(
    samples: Sequence[Sample],
    pool: Mapping[str, Sequence[Candidate]],
    evaluator: Evaluator,
    strangers: Strangers,
    *,
    batch: int = 64,
    against_negatives: bool = False,
) -> Iterator[Judged]:
    """Judge every candidate of the samples, `batch` samples at a time; equal words of a question are judged once."""
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        candidates = [pool.get(sample.question.key, ()) for sample in part]
        others = [
            {worker: strangers.draw(sample, worker) for worker in dict.fromkeys(one.worker for one in found)}
            for sample, found in zip(part, candidates, strict=True)
        ]
        asked = [
            list(
                dict.fromkeys(
                    [*(one.rationale for one in found), *(text for texts in drawn.values() for text in texts)]
                )
            )
            for found, drawn in zip(candidates, others, strict=True)
        ]
        found_confidences = evaluator.confidences(part, asked)
        for sample, found, drawn, texts, confidence in zip(
            part, candidates, others, asked, found_confidences, strict=True
        ):
            l_of = dict(zip(texts, confidence.with_each, strict=True))
            aside = dict(zip(texts, confidence.gain_on_negatives or [0.0] * len(texts), strict=True))
            for one in found:
                foreign_l = [l_of[text] for text in drawn[one.worker]]
                yield Judged(
                    sample.question.key,
                    sample.question.task,
                    one,
                    gain=l_of[one.rationale] - confidence.without - (aside[one.rationale] if against_negatives else 0),
                    content=l_of[one.rationale] - float(np.mean(foreign_l)) if foreign_l else 0.0,
                )


class Strangers:
    """Draws, for a question, up to `count` rationales that a worker wrote for others of its task."""

    def __init__(
        self, samples: Sequence[Sample], pool: Mapping[str, Sequence[Candidate]], count: int, seed: int | Sequence[int]
    ) -> None:
        self._count = count
        self._rng = np.random.default_rng(seed)
        self._known: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for sample in samples:
            for one in pool.get(sample.question.key, ()):
                known = self._known.setdefault((sample.question.task, one.worker), [])
                known.append((sample.question.key, one.rationale))

    def draw(self, sample: Sample, worker: str) -> list[str]:
        """Return what the worker wrote for some others."""
        known = self._known[sample.question.task, worker]
        drawn = [known[place] for place in self._rng.integers(len(known), size=2 * self._count)]
        return [text for question, text in drawn if question != sample.question.key][: self._count]


@dataclass(frozen=True)
class Choice:
    """The rationales that a question kept, and in what proportion to draw them. None kept: it is taught to stop."""

    rationales: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def draw(self, rng: np.random.Generator) -> str | None:
        """Return one of the rationales, or None where none was kept."""
        return self.rationales[rng.choice(len(self.rationales), p=self.weights)] if self.rationales else None


Keeps = Callable[[Judged], bool]


def choose(judged: Iterable[Judged], keeps: Keeps, *, temperature: float) -> dict[str, Choice]:
    """Return what every judged question kept, drawn in proportion to exp(gain / temperature) (inf: evenly)."""
    kept: dict[str, list[Judged]] = {}
    for one in judged:
        kept.setdefault(one.question, [])
        if keeps(one):
            kept[one.question].append(one)
    choices = {}
    for question, members in kept.items():
        gain_K = np.array([member.gain for member in members]) / temperature
        odds_K = np.exp(gain_K - gain_K.max(initial=-np.inf))
        weights = tuple((odds_K / odds_K.sum()).tolist()) if members else ()
        choices[question] = Choice(tuple(member.candidate.rationale for member in members), weights)
    return choices


def report(judged: Iterable[Judged], margins: Margins) -> dict[str, dict[str, dict[str, int]]]:
    """Count the verdicts: {"worker": {name: {verdict: count}}, "task": {...}}."""
    counts: dict[str, dict[str, dict[str, int]]] = {"worker": {}, "task": {}}
    for one in judged:
        verdict = one.verdict(margins)
        for kind, name in (("worker", one.candidate.worker), ("task", one.task)):
            row = counts[kind].setdefault(name, dict.fromkeys(map(str, Verdict), 0))
            row[verdict] += 1
    return counts
