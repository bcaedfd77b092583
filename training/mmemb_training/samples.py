"""The data of training: questions, what answers them, and which of two samples may be each other's negative.

A worker that writes rationales is handed a Question and nothing else, so that no rationale can leak its target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.rows import Row, RowEncoder


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


def held_apart(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Return the samples that are taught, and about `count` that are held apart, by their questions' hashes.

    Of every task as large a share, at most MOST_HELD, and at least one sample of two or more. The hashes are of keys
    alone: the same ones whatever the order, and whatever other data sets there are.
    """
    if not count:
        return list(samples), []
    tasks: dict[str, list[str]] = {}
    for sample in samples:
        tasks.setdefault(sample.question.task, []).append(sample.question.key)
    share, apart = min(MOST_HELD, count / len(samples)), set[str]()
    for keys in tasks.values():
        keys.sort(key=lambda key: hashlib.sha256(key.encode()).digest())
        apart.update(keys[: ceil(share * len(keys)) if len(keys) > 1 else 0])
    return [one for one in samples if one.question.key not in apart], [
        one for one in samples if one.question.key in apart
    ]


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
