"""The data of training: questions, what answers them, and which of two samples may be each other's negative.

A worker that writes rationales is handed a Question and nothing else, so that no rationale can leak its target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def relevance(samples: Sequence[Sample], targets: Sequence[Target]) -> Tensor:
    """Return which target answers which sample, bool (samples, targets): what is true there is never a negative."""
    return torch.tensor([[sample.wanted in target.labels for target in targets] for sample in samples])
