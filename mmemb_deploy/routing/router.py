"""Which inputs reason: gate scores and a policy in, routes out. Pure Python, to be read and tested alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from mmemb_deploy.errors import OptionError, check_known

MODES = ("auto", "never", "always")


class Route(StrEnum):
    """The path an input took."""

    FAST = "fast"
    REASON = "reason"


@dataclass(frozen=True)
class Policy:
    """`reasoning` is "never", "always" or "auto"; "auto" follows the threshold, or the rate where one is given.

    Raises OptionError for values outside 0..1, and for a rate or threshold that the mode would ignore.
    """

    reasoning: str = "auto"
    threshold: float = 0.5  # a score at or above it reasons
    rate: float | None = None  # share of a call's inputs that reason, highest scores first

    def __post_init__(self) -> None:
        check_known("reasoning", self.reasoning, MODES)
        if not 0 <= self.threshold <= 1:
            raise OptionError(f"threshold is {self.threshold}: it must lie in 0..1, as gate scores do")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise OptionError(f"reasoning_rate is {self.rate}: it must lie in 0..1")
        if self.rate is not None and self.reasoning != "auto":
            raise OptionError(f"reasoning_rate only works with reasoning='auto', not {self.reasoning!r}")

    def quota(self, inputs: int) -> int | None:
        """Return how many of a call's inputs may reason, or None where their scores alone decide."""
        return None if self.rate is None else int(self.rate * inputs + 1e-9)

    def wants(self, score: float) -> bool:
        """Return whether an input of this score reasons, where scores alone decide."""
        return self.reasoning == "always" or (self.reasoning == "auto" and score >= self.threshold)


def highest(scored: Iterable[tuple[int, float]], quota: int) -> list[int]:
    """Return the rows of the `quota` highest scores, highest first, the earlier row where scores are equal."""
    ordered: Sequence[tuple[int, float]] = sorted(scored, key=lambda pair: (-pair[1], pair[0]))
    return [row for row, _ in ordered[:quota]]
