"""What happens to an input while it is embedded, as it happens: its score, the words of its rationale, its end.

Axes: D embedding size.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.results import Detail


@dataclass(frozen=True)
class Scored:
    """The fast path is through: the gate's score, NaN without a gate, and the direct embedding (D,), L2-normalised."""

    score: float
    threshold: float | None  # that "auto" holds scores against now, whatever this input asked for; None without a gate
    embedding: Floats
    seconds: float  # since the input was given, waiting included


@dataclass(frozen=True)
class Wrote:
    """More of the rationale: its next words, and how many tokens they are."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Ended:
    """The input is embedded: how, as what (D,), L2-normalised, and in how long."""

    detail: Detail
    embedding: Floats
    seconds: float  # since the input was given, waiting included


Event = Scored | Wrote | Ended


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one try wants: its one input, and the options of `encode`. The server's own Ask takes its place."""

    inputs: Sequence[Any]
    options: EncodeOptions


class Watched(Protocol):
    """What the page needs of the engine that serves it."""

    @property
    def embedder(self) -> Embedder:
        """Return the embedder, for what it says of its bundle."""
        ...

    def watch(self, ask: Ask) -> AsyncGenerator[Event]:
        """Embed one input and yield one Scored, any number of Wrote, one Ended; closing it gives the work up.

        Raises MmembError, before the first of them or between.
        """
        ...
