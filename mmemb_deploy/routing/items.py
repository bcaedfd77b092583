"""An input on its way from row to embedding, and the protocol of whoever writes its rationale.

Axes: D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmemb_deploy.backends.protocol import Cache
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.inputs.rows import Row

Outcome = tuple[Any, ...]
OUTCOME = (
    "embedding_D",
    "score",
    "threshold",
    "degraded_by",
    "reasoned",
    "source",
    "fallback",
    "fast_path",
    "generation",
    "queued",
    "held",
)  # what an item does not have before it runs


@dataclass(frozen=True)
class Reasoned:
    """A reasoned embedding (D,), L2-normalised, and the rationale's token ids without its markers."""

    embedding_D: Floats
    token_ids: list[int]
    truncated: bool  # the token limit closed the rationale


@dataclass
class Item:
    """An input: its row, then what the fast path found, then what reasoning wrote."""

    index: int  # of the input in the call
    row: Row
    preprocess: float  # seconds, as the others below
    given: list[int] | None = None  # a rationale that the caller wrote, as token ids
    chat: Callable[[], Any] | None = None  # builds what a server is asked, where one writes the rationales
    pages: tuple[int, ...] = ()  # of its document
    embedding_D: Floats | None = None
    score: float = 0.0
    threshold: float | None = None  # that the score was held against, where one was
    degraded_by: str | None = None  # what took its reasoning away
    reasoned: Reasoned | None = None
    source: str | None = None  # who wrote the rationale
    fallback: str | None = None  # why there is none, where its writer may fail
    fast_path: float = 0.0
    generation: float = 0.0
    queued: float = 0.0  # before its prompt ran
    held: float = 0.0  # with its cache, before it was decoded

    def end(self, reasoned: Reasoned, source: str) -> None:
        """Take what `source` wrote."""
        self.reasoned, self.embedding_D, self.source = reasoned, reasoned.embedding_D, source

    @property
    def outcome(self) -> Outcome:
        """Return what running it has found, for the same item elsewhere."""
        return tuple(getattr(self, name) for name in OUTCOME)

    @outcome.setter
    def outcome(self, outcome: Outcome) -> None:
        for name, value in zip(OUTCOME, outcome, strict=True):
            setattr(self, name, value)


class RationaleWriter(Protocol):
    """Writes rationales: the bundle's own generator, a caller who brought them, a server."""

    @property
    def name(self) -> str:
        """Return what details call it."""
        ...

    def write(self, items: Sequence[Item], caches: Sequence[Cache], max_tokens: int) -> list[Reasoned | str]:
        """Return the reasoned embedding of every item, which goes on from its cache, or why it has no rationale."""
        ...
