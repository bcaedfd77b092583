"""What `encode` returns beside the vectors: which way each input went, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from mmemb_deploy.errors import InputError
from mmemb_deploy.routing.router import Route


@dataclass(frozen=True)
class Timings:
    """Seconds: an input's own preprocessing, then what its batches took; `generation` includes a reasoner's answers.

    An input on the fast route generates none, unless it waited for a reasoner that failed. `queued` passed before its
    prompt ran, `held` between that and the first token of its rationale.
    """

    preprocess: float
    fast_path: float
    generation: float
    queued: float = 0.0
    held: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all stages, without waiting."""
        return self.preprocess + self.fast_path + self.generation


@dataclass(frozen=True)
class Detail:
    """How one input was embedded."""

    route: Route
    gate_score: float  # probability, by the model's own next-token choice, that reasoning pays; NaN without a gate
    threshold: float | None  # that the score was held against; None where something else decided
    rationale: str | None
    rationale_ids: tuple[int, ...]  # without the markers around them
    rationale_source: str | None  # "caller", "bundle", or the model and the address of a reasoner
    truncated: bool  # the token limit closed the rationale
    fallback: str | None  # why an input that was to reason got its direct embedding, where the reasoner may fail
    degraded_by: str | None  # what took reasoning away from an input that was to reason: "load", "deadline" or "memory"
    prompt_tokens: int
    visual_tokens: int  # of those, the ones that stand for pixels
    timings: Timings
    pages: tuple[int, ...] = ()  # of its document, counted from 1; none without one

    @property
    def rationale_tokens(self) -> int:
        """Tokens of the rationale, without the markers around it."""
        return len(self.rationale_ids)


@dataclass(frozen=True)
class EncodeResult:
    """Embeddings in the order of the inputs; where errors are returned, a failed row is NaN (0 if not a float)."""

    embeddings: NDArray[Any]
    details: list[Detail | None]  # None for a failed row
    errors: list[InputError]
