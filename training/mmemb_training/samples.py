"""The data of training: questions, what answers them, and which of two samples may be each other's negative.

A worker that writes rationales is handed a Question and nothing else, so that no rationale can leak its target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.rows import Row, RowEncoder

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One side of a pair. `content` is an input of `Embedder.encode`, `instruction` None where the default holds."""

    key: str  # unique in its data set
    task: str  # the family whose samples share batches and reports
    content: Any
    instruction: str | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """The other side. A question that wants one of the `labels` is answered by it."""

    content: Any
    labels: frozenset[str]
    instruction: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question, what label answers it, its own target, and known hard negatives."""

    question: Question
    wanted: str
    target: Target
    negatives: tuple[Target, ...] = ()


class Lazy(Sequence[T]):
    """A sequence of `length` whose members `make` makes by their index, whenever they are asked for."""

    def __init__(self, length: int, make: Callable[[int], T]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            chosen = range(self._length)[index]
            return Lazy(len(chosen), lambda place: self._make(chosen[place]))
        return self._make(range(self._length)[index])


def query_row(question: Question, encoder: RowEncoder) -> Row:
    """Return a question's prompt; raises InputError for a content that cannot be read."""
    default = encoder.prompt.format.query_instruction
    return encoder.row(
        parse(question.content, vision=encoder.vision),
        default if question.instruction is None else question.instruction,
    )


def target_row(target: Target, encoder: RowEncoder) -> Row:
    """Return a target's prompt; raises InputError for a content that cannot be read."""
    default = encoder.prompt.format.document_instruction
    return encoder.row(
        parse(target.content, vision=encoder.vision), default if target.instruction is None else target.instruction
    )
