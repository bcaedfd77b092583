"""The data of training: questions, what answers them, and which of two samples may be each other's negative.

A worker that writes rationales is handed a Question and nothing else, so that no rationale can leak its target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

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


MOST_HELD = 0.2  # of a task's samples that may be held apart


def held_apart(keys: Iterable[str], task_N: NDArray[np.integer[Any]], count: int) -> NDArray[np.bool_]:
    """Return which samples are held apart, about `count` of them, by the hashes of their questions' keys, bool (N,).

    Of every task as large a share, at most MOST_HELD, and at least one sample of two or more. The hashes are of keys
    alone: the same ones whatever the order, and whatever other data sets there are.
    """
    apart_N = np.zeros(len(task_N), bool)
    if not count:
        return apart_N
    hash_N = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys], np.uint64)
    share = min(MOST_HELD, count / len(task_N))
    for task in np.unique(task_N):
        members = np.flatnonzero(task_N == task)
        held = ceil(share * len(members)) if len(members) > 1 else 0
        apart_N[members[np.argsort(hash_N[members], kind="stable")[:held]]] = True
    return apart_N


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
    request = parse(question.content, vision=encoder.vision)
    return encoder.row(request, encoder.prompt.format.asked(question.instruction))


def target_row(target: Target, encoder: RowEncoder) -> Row:
    """Return a target's prompt; raises InputError for a content that cannot be read."""
    default = encoder.prompt.format.document_instruction
    return encoder.row(
        parse(target.content, vision=encoder.vision), default if target.instruction is None else target.instruction
    )
