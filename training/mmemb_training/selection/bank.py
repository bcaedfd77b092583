"""Targets embedded once by a frozen model, and hard negatives mined among them.

Axes: Q questions, C distinct targets, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mmemb_deploy.inputs.rows import Row
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.encoder import Encoder
from mmemb_training.samples import Sample, Target, query_row, target_row

Floats = NDArray[np.float32]
_Key = tuple[frozenset[str], str | None]


class TargetBank:
    """The distinct targets of samples and of their negatives: `embeddings_CD`, L2-normalised, and `targets`.

    Targets with the same labels are one.
    """

    def __init__(self, samples: Iterable[Sample], checkpoint: Checkpoint) -> None:
        distinct = {_key(target): target for sample in samples for target in (sample.target, *sample.negatives)}
        self.targets = list(distinct.values())
        self.embeddings_CD = embed_rows(checkpoint, [target_row(target, checkpoint.rows) for target in self.targets])
        self._index = {key: index for index, key in enumerate(distinct)}
        self._labelled: dict[str, list[int]] = {}
        for index, target in enumerate(self.targets):
            for label in target.labels:
                self._labelled.setdefault(label, []).append(index)

    def index(self, target: Target) -> int:
        """Return a target's row of `embeddings_CD`."""
        return self._index[_key(target)]

    def answers(self, wanted: str) -> list[int]:
        """Return the rows of the targets that answer a question."""
        return self._labelled.get(wanted, [])

    def candidates(self, sample: Sample) -> Floats:
        """Return the embeddings of a sample's target and of its negatives, in this order."""
        return self.embeddings_CD[[self.index(target) for target in (sample.target, *sample.negatives)]]


def mine_negatives(
    samples: Sequence[Sample],
    bank: TargetBank,
    checkpoint: Checkpoint,
    *,
    hard: int,
    even: int = 0,
    share_of_positive: float | None = 0.95,
    seed: int = 0,
) -> list[Sample]:
    """Return the samples with more negatives: the `hard` most similar targets of others, and `even` drawn evenly.

    A target that answers the question by its labels is never a negative. Labels miss some, so a target whose cosine
    exceeds `share_of_positive` times that of the question's own target is not taken as a hard one (NV-Retriever, arXiv
    2407.15831); None trusts the labels.
    """
    queries_QD = embed_rows(checkpoint, [query_row(sample.question, checkpoint.rows) for sample in samples])
    rng = np.random.default_rng(seed)
    mined = []
    for sample, query_D in zip(samples, queries_QD, strict=True):
        similarity_C = bank.embeddings_CD @ query_D
        wrong_C = np.ones(len(similarity_C), bool)
        wrong_C[bank.answers(sample.wanted)] = False
        usable_C = wrong_C.copy()
        if share_of_positive is not None:
            usable_C &= similarity_C <= share_of_positive * similarity_C[bank.index(sample.target)]
        usable = np.flatnonzero(usable_C)
        hardest = usable[np.argsort(-similarity_C[usable], kind="stable")[:hard]]
        others = np.setdiff1d(np.flatnonzero(wrong_C), hardest)
        drawn = rng.choice(others, size=min(even, len(others)), replace=False)
        found = (bank.targets[index] for index in (*hardest, *drawn))
        mined.append(replace(sample, negatives=(*sample.negatives, *found)))
    return mined


def embed_rows(checkpoint: Checkpoint, rows: Sequence[Row], *, batch: int = 128) -> Floats:
    """Return the direct embeddings of prompts, L2-normalised, in their order."""
    encoder = Encoder(checkpoint).eval()
    order = np.argsort([row.length for row in rows], kind="stable")
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            direct_BD, _ = encoder.embed([rows[index] for index in order[start : start + batch]], [])
            pieces.append(F.normalize(direct_BD.float(), dim=-1).numpy(force=True))
    embedded_ND: Floats = np.concatenate(pieces)[np.argsort(order)]
    return embedded_ND


def _key(target: Target) -> _Key:
    return target.labels, target.instruction
