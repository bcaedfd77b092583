"""What a worker is: something that is shown questions, never their targets, and writes rationales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmemb_training.samples import Question

REQUEST = (
    "Think briefly about what the input below shows or asks, and what would answer it in a search. Name what tells the "
    "right result from similar ones. Do not make up a result. End with a short conclusion."
)


@dataclass(frozen=True)
class Written:
    """What a worker wrote for one question: its candidates, or why there are none."""

    rationales: tuple[str, ...]
    error: str | None = None


class Worker(Protocol):
    """Writes `samples` candidates per question. `name` says who wrote a candidate, in the pool and its reports."""

    @property
    def name(self) -> str: ...

    @property
    def samples(self) -> int: ...

    def write(self, questions: Sequence[Question]) -> list[Written]:
        """Return what was written for each question, in their order.

        A question that fails is returned with its error, for a later run to try again; an exception means that no
        question can succeed.
        """
        ...
