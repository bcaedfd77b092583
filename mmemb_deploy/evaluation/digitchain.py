"""DigitChain: retrieval over real handwritten digits, where some queries need reasoning and some do not.

The images are the 1,797 8x8 digits that scikit-learn ships (UCI, Optical Recognition of Handwritten Digits), split
once, by image, with a fixed seed. Every example is a query, its candidates with their relevance, and the rationale that
a person would find natural for it:

    match    one digit, find the same drawing (other noise) among look-alikes of its class  reasoning may blur it
    name     one digit, find its name; or a name, find its digit                            reasoning is not needed
    chain-k  k digits and k-1 operators, left to right modulo 10, find the result           reasoning is needed
    text     the same chains in words, half of them a single digit's name

Needs numpy and Pillow; scikit-learn where the digits are read. Everything is a function of (split, seed).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy.errors import MissingExtraError, check_known

Split = Literal["train", "calibration", "test"]
Pixels = NDArray[np.uint8]

FAMILIES = ("match", "name", "chain-2", "chain-3", "chain-4", "chain-5", "text")
MIXED_SHARES = {"match": 7, "name": 7, "chain-2": 1, "chain-3": 1, "chain-4": 1, "chain-5": 1, "text": 2}  # of 20
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPERATORS = {"+": "plus", "-": "minus", "x": "times"}
MATCH_INSTRUCTION = "Find the same drawing."
RESULT_INSTRUCTION = "Find the result."
IMAGE_SIDE = 32  # pixels
LOOKALIKES = 9
MAX_TERMS = 5
_SPLIT_SIZES = {"train": 1250, "calibration": 150, "test": 397}
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Candidate:
    """Something a query may retrieve: an input for `encode_document`, the value it shows, the drawing it came from."""

    content: dict[str, Any]
    value: int
    drawing: int | None = None


@dataclass(frozen=True)
class Example:
    """A query, its candidates, and which of them are right.

    `content` is an input for `encode_query`, which shows or spells `terms` with `operators` between them; `value` is
    their result; `relevant[i]` says whether `candidates[i]` answers the query.
    """

    family: str
    instruction: str
    content: dict[str, Any]
    terms: tuple[int, ...]
    operators: tuple[str, ...]
    value: int
    candidates: tuple[Candidate, ...]
    relevant: tuple[bool, ...]

    @property
    def rationale(self) -> str:
        """The reasoning an exact solver writes."""
        return solve(self.terms, self.operators)[1]

    @property
    def target(self) -> Candidate:
        """The first relevant candidate, the one to train towards."""
        return self.candidates[self.relevant.index(True)]


@dataclass(frozen=True)
class Drawings:
    """The digits of one split: `images` (count, 8, 8) in 0..16, their `values`, and each one's look-alikes."""

    images: NDArray[np.float64]
    values: NDArray[np.int64]
    lookalikes: NDArray[np.int64]  # (count, LOOKALIKES): nearest drawings of the same value, nearest first

    def of_value(self, value: int) -> NDArray[np.int64]:
        """Return the indices of the drawings that show `value`."""
        return np.flatnonzero(self.values == value)


@lru_cache(maxsize=3)
def drawings(split: Split) -> Drawings:
    """Read one split of the digits. Raises MissingExtraError without scikit-learn."""
    check_known("split", split, _SPLIT_SIZES)
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "bench") from error
    digits: Any = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    ends = np.cumsum(list(_SPLIT_SIZES.values()))
    index = list(_SPLIT_SIZES).index(split)
    chosen = order[ends[index] - _SPLIT_SIZES[split] : ends[index]]
    images, values = digits.images[chosen], digits.target[chosen].astype(np.int64)
    flat = images.reshape(len(images), -1)
    squares = (flat**2).sum(axis=1)  # of whole numbers, so that no rounding parts this from the norm of differences
    distance = np.sqrt(squares[:, None] + squares - 2 * flat @ flat.T)
    distance[values[:, None] != values[None]] = np.inf
    np.fill_diagonal(distance, np.inf)
    return Drawings(images, values, np.argsort(distance, axis=1)[:, :LOOKALIKES])


def apply_operator(left: int, operator: str, right: int) -> int:
    """Return `left operator right` modulo 10."""
    return {"+": left + right, "-": left - right, "x": left * right}[operator] % 10


def solve(terms: Sequence[int], operators: Sequence[str]) -> tuple[int, str]:
    """Evaluate a chain from left to right modulo 10; return its result and the rationale: the chain, then its steps."""
    if not operators:
        return terms[0], f"one digit; it is {terms[0]};"
    result, chain, steps = terms[0], str(terms[0]), ""
    for operator, right in zip(operators, terms[1:], strict=True):
        step = apply_operator(result, operator, right)
        chain += f"{operator}{right}"
        steps += f"{result}{operator}{right}={step};"
        result = step
    return result, f"{chain};{steps}"


class DigitChain:
    """Draws examples from one split. Two instances of the same split and seed draw the same examples.

    Another `rendering` draws the same digits with other distortions and noise.
    """

    def __init__(self, split: Split, seed: int, rendering: int = 0) -> None:
        self.drawings = drawings(split)
        self._distortion = 2 if split == "train" else 1
        index = list(_SPLIT_SIZES).index(split)
        self._rng = np.random.default_rng([seed, index])
        self._noise = np.random.default_rng([seed, index, rendering + 1])

    def examples(self, family: str, count: int) -> list[Example]:
        """Draw `count` examples of one family."""
        check_known("family", family, FAMILIES)
        return [self._draw(family, position) for position in range(count)]

    def mixed(self, count: int) -> list[Example]:
        """Draw `count` examples of the mixed traffic, whose shares are exact in every 20."""
        return [self._draw(family, position) for position, family in enumerate(islice(self._mixed_families(), count))]

    def _mixed_families(self) -> Iterator[str]:
        slots = [family for family, share in MIXED_SHARES.items() for _ in range(share)]
        while True:
            yield from self._rng.permutation(slots)

    def _draw(self, family: str, position: int) -> Example:
        if family == "match":
            return self._match()
        if family == "name":
            value = int(self._rng.integers(10))
            if position % 2:
                return self._result(family, {"text": NAMES[value]}, [value], [], images=True)
            return self._result(family, {"image": self._image_of(value)}, [value], [], images=False)
        in_words = family == "text"
        terms = int(family[-1]) if not in_words else 1 if position % 2 else int(self._rng.integers(2, MAX_TERMS + 1))
        values = [int(value) for value in self._rng.integers(10, size=terms)]
        operators = [str(operator) for operator in self._rng.choice(list(OPERATORS), size=terms - 1)]
        words = [NAMES[value] for value in values] if in_words else list("abcde"[:terms])
        symbols = [OPERATORS[operator] if in_words else operator for operator in operators]
        text = " ".join(part for pair in zip(words, [*symbols, ""], strict=True) for part in pair).rstrip()
        content: dict[str, Any] = {"text": text}
        if not in_words:
            content["images"] = [self._image_of(value) for value in values]
        return self._result(family, content, values, operators, images=bool(self._rng.integers(2)))

    def _match(self) -> Example:
        drawing = int(self._rng.integers(len(self.drawings.values)))
        value = int(self.drawings.values[drawing])
        candidates = [
            Candidate({"image": self.render(shown)}, value, shown)
            for shown in [drawing, *self.drawings.lookalikes[drawing].tolist()]
        ]
        content = {"image": self.render(drawing)}
        return self._example("match", MATCH_INSTRUCTION, content, [value], [], candidates, drawing)

    def _result(
        self, family: str, content: dict[str, Any], values: list[int], operators: list[str], *, images: bool
    ) -> Example:
        candidates = [self._candidate(value, image=images) for value in range(10)]
        return self._example(family, RESULT_INSTRUCTION, content, values, operators, candidates, None)

    def _example(
        self,
        family: str,
        instruction: str,
        content: dict[str, Any],
        terms: list[int],
        operators: list[str],
        candidates: list[Candidate],
        drawing: int | None,
    ) -> Example:
        value, _ = solve(terms, operators)
        shuffled = tuple(candidates[index] for index in self._rng.permutation(len(candidates)))
        relevant = tuple(shown.value == value if drawing is None else shown.drawing == drawing for shown in shuffled)
        return Example(family, instruction, content, tuple(terms), tuple(operators), value, shuffled, relevant)

    def _candidate(self, value: int, *, image: bool) -> Candidate:
        if not image:
            return Candidate({"text": NAMES[value]}, value)
        drawing = int(self._rng.choice(self.drawings.of_value(value)))
        return Candidate({"image": self.render(drawing)}, value, drawing)

    def _image_of(self, value: int) -> Pixels:
        return self.render(int(self._rng.choice(self.drawings.of_value(value))))

    def render(self, drawing: int, noise: np.random.Generator | None = None) -> Pixels:
        """Draw one digit at IMAGE_SIDE, grey, with a new small distortion and noise; uint8 (side, side).

        Rotation, scale and shift are small on every split; training rotates twice as far, shears and stretches. They
        are drawn from `noise`, by default from that of all this instance's pictures.
        """
        rng, more = noise or self._noise, self._distortion
        angle = more * rng.uniform(-0.14, 0.14)
        shear, stretch = (more - 1) * rng.uniform(-0.25, 0.25), 1 + (more - 1) * rng.uniform(-0.12, 0.12)
        shift = rng.uniform(-0.4, 0.4, size=2)  # in pixels of the 8x8 source
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        distort = np.array([[stretch, shear], [0, 1 / stretch]])
        to_source = turn @ distort * (8 / IMAGE_SIDE / rng.uniform(0.74, 0.90))
        offset = 4 + shift - to_source @ np.full(2, IMAGE_SIDE / 2)
        matrix = (*to_source[0], offset[0], *to_source[1], offset[1])
        small = Image.fromarray((self.drawings.images[drawing] * (255 / 16)).astype(np.uint8))
        large = small.transform((IMAGE_SIDE, IMAGE_SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        noisy = np.asarray(large, dtype=np.float64) + rng.normal(0, 14, size=(IMAGE_SIDE, IMAGE_SIDE))
        return noisy.clip(0, 255).astype(np.uint8)
