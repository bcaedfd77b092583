"""DigitChain as training data: samples, and four workers that write rationales for them.

Rule-based workers cannot read images: they are told the digits of a question by its key, and never its target. One is
exact; three are flawed in the ways that real workers are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmemb_deploy.evaluation.digitchain import (
    NAMES,
    OPERATORS,
    Candidate,
    DigitChain,
    Example,
    Split,
    apply_operator,
    solve,
)
from mmemb_training.pool.workers import Written
from mmemb_training.samples import Question, Sample, Target

FAMILY_SHARES = {"match": 5, "name": 4, "chain-2": 3, "chain-3": 3, "chain-4": 3, "chain-5": 3, "text": 4}
LOOKALIKES_PER_MATCH = 2  # hard negatives of a match
MISREMEMBERED = 0.4  # share of single steps that the slipping worker believes wrongly
_BELIEFS_SEED = 7


@dataclass(frozen=True)
class Digits:
    """Samples, and what a rule-based worker is told of their questions by key: the terms and the operators."""

    samples: tuple[Sample, ...]
    told: Mapping[str, tuple[Sequence[int], Sequence[str]]]


def draw_digits(split: Split, seed: int, count: int, rendering: int = 0) -> Digits:
    """Draw `count` samples in training's shares of the families; a function of its arguments.

    Another `rendering` shows the same drawings with other distortions and noise, beside other look-alikes.
    """
    rng = np.random.default_rng([seed, count])
    shares = np.array(list(FAMILY_SHARES.values()), np.float64)
    source = DigitChain(split, int(rng.integers(2**31)), rendering)
    examples = [
        example
        for family, members in zip(FAMILY_SHARES, rng.multinomial(count, shares / shares.sum()), strict=True)
        for example in source.examples(family, int(members))
    ]
    keys = [f"{split}-{seed}-{index}" for index in range(count)]
    chosen = np.random.default_rng([seed, count, rendering])
    return Digits(
        tuple(_sample(key, example, chosen) for key, example in zip(keys, examples, strict=True)),
        {key: (example.terms, example.operators) for key, example in zip(keys, examples, strict=True)},
    )


def _sample(key: str, example: Example, rng: np.random.Generator) -> Sample:
    target = example.target
    lookalikes: list[Candidate] = []
    if example.family == "match":
        others = [shown for shown in example.candidates if shown is not target]
        lookalikes = [others[index] for index in rng.choice(len(others), LOOKALIKES_PER_MATCH, replace=False)]
    return Sample(
        question=Question(key=key, task=example.family, content=example.content, instruction=example.instruction),
        wanted=f"drawing {target.drawing}" if example.family == "match" else f"value {example.value}",
        target=_target(target),
        negatives=tuple(_target(shown) for shown in lookalikes),
    )


def _target(candidate: Candidate) -> Target:
    labels = {f"value {candidate.value}"}
    if candidate.drawing is not None:
        labels.add(f"drawing {candidate.drawing}")
    return Target(content=candidate.content, labels=frozenset(labels))


class DigitWorker:
    """A rule that writes rationales from the terms and operators of a question."""

    def __init__(self, name: str, told: Mapping[str, tuple[Sequence[int], Sequence[str]]], *, samples: int) -> None:
        self.name = name
        self.samples = samples
        self._told = told
        self._rule = RULES[name]

    def write(self, questions: Sequence[Question]) -> list[Written]:
        """Write the candidates of every question: all the same, as of a worker that does not sample."""
        return [Written((self._rule(*self._told[question.key]),) * self.samples, None) for question in questions]


def exact(terms: Sequence[int], operators: Sequence[str]) -> str:
    """Return the chain, then its steps, all right."""
    return solve(terms, operators)[1]


def verbose(terms: Sequence[int], operators: Sequence[str]) -> str:
    """Return the same content in many words."""
    words = zip(map(_name, terms), [*map(_word, operators), ""], strict=True)
    shown = " ".join(word for pair in words for word in pair)
    steps, result = "", terms[0]
    for operator, right in zip(operators, terms[1:], strict=True):
        step = apply_operator(result, operator, right)
        steps += f" now {_name(result)} {_word(operator)} {_name(right)} is {_name(step)};"
        result = step
    return f"let us look at it step by step. we see {shown.rstrip()};{steps} so the result is {_name(result)};"


def slips(terms: Sequence[int], operators: Sequence[str]) -> str:
    """Return the exact solver's format with wrong arithmetic: single steps that this worker believes wrongly.

    The beliefs are fixed, as a weak model's are: the same step is always wrong in the same way.
    """
    if not operators:
        return exact(terms, operators)
    result, chain, steps = terms[0], str(terms[0]), ""
    for operator, right in zip(operators, terms[1:], strict=True):
        step = (apply_operator(result, operator, right) + _BELIEFS[operator][result][right]) % 10
        chain += f"{operator}{right}"
        steps += f"{result}{operator}{right}={step};"
        result = step
    return f"{chain};{steps}"


def hollow(terms: Sequence[int], operators: Sequence[str]) -> str:
    """Return the right format with empty content: no digit is named."""
    return re.sub(r"\d", "?", exact(terms, operators))


RULES = {"exact": exact, "verbose": verbose, "slips": slips, "hollow": hollow}
SAMPLES = {"exact": 1, "verbose": 1, "slips": 2, "hollow": 2}  # the cheap workers are asked twice as often


def digit_workers(digits: Digits) -> list[DigitWorker]:
    """Return the four workers, told of `digits`."""
    return [DigitWorker(name, digits.told, samples=samples) for name, samples in SAMPLES.items()]


def states_only_truths(rationale: str) -> bool:
    """Judge a rationale alone, without its pair: is every step that it states right? A statement of nothing passes."""
    values = {name: str(value) for value, name in enumerate(NAMES)}
    symbols = {word: symbol for symbol, word in OPERATORS.items()}
    plain = re.sub(r"[a-z]+", lambda word: values.get(word[0], symbols.get(word[0], word[0])), rationale)
    stated = re.findall(r"(\d) ?([-+x]) ?(\d) ?(?:=|is) ?(\d)", plain)
    return all(apply_operator(int(left), by, int(right)) == int(step) for left, by, right, step in stated)


def _name(value: int) -> str:
    return NAMES[value]


def _word(operator: str) -> str:
    return OPERATORS[operator]


def _beliefs() -> dict[str, list[list[int]]]:
    """Return, by operator and operands, by how much the slipping worker is off: 0 where it is right."""
    rng = np.random.default_rng(_BELIEFS_SEED)
    return {
        operator: np.where(rng.random((10, 10)) < MISREMEMBERED, rng.integers(1, 10, (10, 10)), 0).tolist()
        for operator in OPERATORS
    }


_BELIEFS = _beliefs()
