"""Strips: rows of handwritten digits, where the instruction decides whether reasoning helps, is idle or harms.

A strip is one to eight digits of DigitChain's drawings, with operators between them. The same strip may be asked for

    result    of its chain, left to right modulo 10                          reasoning helps from three digits on
    evens     how many of its digits are even                                reasoning helps a little
    first     its first digit                                                not needed
    same      the strip itself, other noise, among look-alikes               harms: words forget strokes, and a digit
                                                                             that is misread leads astray

so that nothing but the instruction tells them apart. In long chains a product with zero, that an embedding can see,
makes all steps before it idle, and each further step is one more to get wrong. Everything is a function of (split,
seed), and another `rendering` shows the same drawings with other distortions and noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from typing import Any

import numpy as np

from mmemb_deploy.evaluation.digitchain import (
    IMAGE_SIDE,
    NAMES,
    OPERATORS,
    DigitChain,
    Pixels,
    Split,
    apply_operator,
    drawings,
)
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_training.samples import Question, Sample, Target

INSTRUCTIONS = {
    "result": "Find the result.",
    "evens": "Find how many are even.",
    "first": "Find the first digit.",
    "same": "Find the same strip.",
}
LENGTHS = {
    "short": (1, 2),
    "middle": (3, 5),
    "long": (6, 8),
    "evens": (1, 8),
    "first": (1, 8),
    "same": (1, 3),
}  # digits
FAMILIES = tuple(LENGTHS)
CHAINS = FAMILIES[:3]
SHARES = {"short": 3, "middle": 4, "long": 4, "evens": 3, "first": 2, "same": 4}  # of 20, in training and in traffic
ABSORBING = 0.35  # share of the long chains that hold a product with zero among their last three operations
CANDIDATES = 10
SIDE = 16  # pixels of a digit
LOOKS = 12  # distortions and noises of every drawing
_SEED = 17


@dataclass(frozen=True)
class Strip:
    """What a question shows and asks: `aspect` is a key of INSTRUCTIONS, and `family` what it is reported under."""

    family: str
    aspect: str
    digits: tuple[int, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Strips:
    """Samples, and the strips that they show by their questions' keys."""

    samples: tuple[Sample, ...]
    told: Mapping[str, Strip]


def answer_of(aspect: str, digits: Sequence[int], operators: Sequence[str]) -> int:
    """Return the number that answers an aspect of a strip, but for "same", which none does."""
    if aspect == "evens":
        return sum(digit % 2 == 0 for digit in digits)
    if aspect == "first":
        return digits[0]
    result = digits[0]
    for operator, right in zip(operators, digits[1:], strict=True):
        result = apply_operator(result, operator, right)
    return result


def draw_strips(split: Split, seed: int, count: int, rendering: int = 0) -> Strips:
    """Draw `count` questions, whose families have their SHARES in every 20; a function of its arguments."""
    source = _Source(split, seed, rendering)
    drawn = source.draw(count)
    keys = [f"{split}-{seed}-{index}" for index in range(count)]
    return Strips(
        tuple(source.sample(key, one) for key, one in zip(keys, drawn, strict=True)),
        {key: one.strip for key, one in zip(keys, drawn, strict=True)},
    )


def draw_pairs(split: Split, seed: int, count: int) -> list[Pair]:
    """Draw the same questions with their candidates, to measure with; a pair's group is its family."""
    source = _Source(split, seed, 0)
    return [source.pair(one) for one in source.draw(count)]


@dataclass(frozen=True)
class _Drawn:
    """A question before it is rendered: its strip and drawings, and its candidates, of which the first is right."""

    strip: Strip
    drawings: tuple[int, ...]
    candidates: tuple[str | tuple[int, ...], ...]  # a number's name, or drawings


class _Source:
    """Draws questions. What they are depends on the seed alone, how they look on the rendering too."""

    def __init__(self, split: Split, seed: int, rendering: int) -> None:
        self._rng = np.random.default_rng([seed, _SEED])
        self._look = np.random.default_rng([seed, _SEED, rendering])
        self._split, self._drawings = split, drawings(split)

    def draw(self, count: int) -> list[_Drawn]:
        slots = [family for family, share in SHARES.items() for _ in range(share)]
        order = (family for _ in range(count // len(slots) + 1) for family in self._rng.permutation(slots))
        return [self._draw(str(family)) for family in islice(order, count)]

    def sample(self, key: str, drawn: _Drawn) -> Sample:
        """Return a question with its target and, of strips, one look-alike."""
        strip, same = drawn.strip, drawn.strip.aspect == "same"
        shown = [self._target(candidate) for candidate in drawn.candidates[: 2 if same else 1]]
        return Sample(
            question=Question(
                key=key, task=strip.family, content=self._content(drawn), instruction=INSTRUCTIONS[strip.aspect]
            ),
            wanted=_label(drawn.drawings) if same else NAMES[answer_of(strip.aspect, strip.digits, strip.operators)],
            target=shown[0],
            negatives=tuple(shown[1:]),
        )

    def pair(self, drawn: _Drawn) -> Pair:
        """Return a question with all of its candidates, in an order of its own."""
        order = self._rng.permutation(len(drawn.candidates)).tolist()
        return Pair(
            query=self._content(drawn),
            candidates=[self._target(drawn.candidates[index]).content for index in order],
            relevant=[index == 0 for index in order],
            instruction=INSTRUCTIONS[drawn.strip.aspect],
            group=drawn.strip.family,
        )

    def _draw(self, family: str) -> _Drawn:
        low, high = LENGTHS[family]
        length = int(self._rng.integers(low, high + 1))
        shown = self._rng.integers(len(self._drawings.values), size=length).tolist()
        operators = self._rng.choice(list(OPERATORS), size=length - 1).tolist()
        if family == "long" and self._rng.random() < ABSORBING:
            at = length - int(self._rng.integers(1, 4))
            operators[at - 1], shown[at] = "x", int(self._rng.choice(self._drawings.of_value(0)))
        aspect = "result" if family in CHAINS else family
        strip = Strip(family, aspect, tuple(self._drawings.values[shown].tolist()), tuple(operators))
        candidates = self._strips(tuple(shown)) if aspect == "same" else self._numbers(strip)
        return _Drawn(strip, tuple(shown), tuple(candidates))

    def _numbers(self, strip: Strip) -> list[str | tuple[int, ...]]:
        """Return the ten numbers, the right one first: as names, and of every second chain as drawings."""
        answer = answer_of(strip.aspect, strip.digits, strip.operators)
        values = [answer, *(value for value in range(10) if value != answer)]
        if strip.aspect == "result" and self._rng.integers(2):
            return [(int(self._rng.choice(self._drawings.of_value(value))),) for value in values]
        return [NAMES[value] for value in values]

    def _strips(self, shown: tuple[int, ...]) -> list[str | tuple[int, ...]]:
        """Return the strip, then look-alikes: half have one digit by another hand, half another digit."""
        found: list[str | tuple[int, ...]] = [shown]
        while len(found) < CANDIDATES:
            at = int(self._rng.integers(len(shown)))
            drawings, value = self._drawings, int(self._drawings.values[shown[at]])
            others = drawings.of_value(value) if len(found) % 2 else len(drawings.values)
            changed = (*shown[:at], int(self._rng.choice(others)), *shown[at + 1 :])
            if changed not in found:
                found.append(changed)
        return found

    def _content(self, drawn: _Drawn) -> dict[str, Any]:
        words = {"text": " ".join(drawn.strip.operators)} if drawn.strip.operators else {}
        return {"image": self._render(drawn.drawings), **words}

    def _target(self, candidate: str | tuple[int, ...]) -> Target:
        """Return a candidate; a single digit is labelled by its name too, since it answers for it."""
        if isinstance(candidate, str):
            return Target(content={"text": candidate}, labels=frozenset({candidate}))
        labels = {_label(candidate)}
        if len(candidate) == 1:
            labels.add(NAMES[self._drawings.values[candidate[0]]])
        return Target(content={"image": self._render(candidate)}, labels=frozenset(labels))

    def _render(self, shown: Sequence[int]) -> Pixels:
        """Return drawings side by side, (SIDE, SIDE per drawing)."""
        looks = self._look.integers(LOOKS, size=len(shown))
        return np.concatenate(
            [_digit(self._split, drawing, look) for drawing, look in zip(shown, looks.tolist(), strict=True)], axis=1
        )


@cache
def _digit(split: Split, drawing: int, look: int) -> Pixels:
    """Render a drawing in one of its LOOKS, (SIDE, SIDE)."""
    reduced = (SIDE, IMAGE_SIDE // SIDE) * 2
    large = _renderer(split).render(drawing, np.random.default_rng([drawing, look]))
    small: Pixels = large.reshape(reduced).mean(axis=(1, 3)).astype(np.uint8)
    return small


@lru_cache(maxsize=3)
def _renderer(split: Split) -> DigitChain:
    return DigitChain(split, 0)


def _label(shown: Sequence[int]) -> str:
    """Return the label of a strip of drawings, which no other strip has."""
    return f"strip {'-'.join(map(str, shown))}"
