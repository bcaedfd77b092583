"""Targets embedded once by a frozen model: a shard at a time into one array, in memory or mapped from a file.

Axes: N embedded prompts, C distinct targets, D embedding size, E targets of samples and of their negatives, L labels.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mmemb_deploy.inputs.preprocess import Ints
from mmemb_deploy.inputs.rows import Row
from mmemb_training.ahead import Ahead, in_threads
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.encoder import Encoder
from mmemb_training.processes import ALONE, Processes
from mmemb_training.samples import Lazy, Sample, Target, target_row

Floats = NDArray[np.float32]
Hashes = NDArray[np.uint64]

SHARD = 1024  # prompts whose images are in memory together
BATCH = 128  # prompts that the model reads at once


class TargetBank:
    """The distinct targets of samples and of their negatives: `embeddings_CD`, L2-normalised, and `targets`.

    Targets with the same labels are one. Of a target 150 bytes or fewer are held beside its embedding, which lies in
    `store`, a .npy file, where one is given; its content is read from `samples` when it is asked for.
    """

    def __init__(
        self, samples: Sequence[Sample], checkpoint: Checkpoint, store: Path | None = None, processes: Processes = ALONE
    ) -> None:
        entries = array("Q")  # of each target its hash, its sample, and its place among the sample's
        labels = array("Q")  # of each label its hash, and the entry that bears it
        for number, sample in enumerate(samples):
            for place, target in enumerate((sample.target, *sample.negatives)):
                for label in target.labels:
                    labels.extend((_hash([label]), len(entries) // 3))
                entries.extend((_hash([target.instruction, *sorted(target.labels)]), number, place))
        hash_E, sample_E, place_E = np.frombuffer(entries, np.uint64).reshape(-1, 3).T
        self._hash_C, first_C, member_E = np.unique(hash_E, return_index=True, return_inverse=True)
        self._row_C = np.argsort(np.argsort(first_C))  # rows in the order in which targets are first met
        row_E = self._row_C[member_E]
        last_C = np.zeros(len(first_C), np.int64)
        last_C[row_E] = np.arange(len(row_E))  # of those with one key, the last one's content
        where_C2 = np.stack([sample_E, place_E], axis=1).astype(np.int32)[last_C]

        def target_of(row: int) -> Target:
            number, place = map(int, where_C2[row])
            sample = samples[number]
            return (sample.target, *sample.negatives)[place]

        label_L, entry_L = np.frombuffer(labels, np.uint64).reshape(-1, 2).T
        pairs_L2 = np.unique(np.stack([label_L, row_E[entry_L.astype(np.int64)].astype(np.uint64)], axis=1), axis=0)
        self._label_L, self._labelled_L = pairs_L2[:, 0].copy(), pairs_L2[:, 1].astype(np.int64)
        self.targets = Lazy(len(first_C), target_of)
        rows = Lazy(len(first_C), lambda row: target_row(target_of(row), checkpoint.rows))
        self.embeddings_CD = embed_rows(checkpoint, rows, store, processes)

    def index(self, target: Target) -> int:
        """Return a target's row of `embeddings_CD`."""
        key = np.uint64(_hash([target.instruction, *sorted(target.labels)]))
        found = np.searchsorted(self._hash_C, key)
        if found == len(self._hash_C) or self._hash_C[found] != key:
            raise KeyError(f"no target of this bank has the labels {sorted(target.labels)}")
        return int(self._row_C[found])

    def answers(self, wanted: str) -> Ints:
        """Return the rows of the targets that answer a question, ascending."""
        first, last = (np.searchsorted(self._label_L, np.uint64(_hash([wanted])), side) for side in ("left", "right"))
        return self._labelled_L[first:last]

    def candidates(self, sample: Sample) -> Floats:
        """Return the embeddings of a sample's target and of its negatives, in this order."""
        return self.embeddings_CD[[self.index(target) for target in (sample.target, *sample.negatives)]]


def embed_rows(
    checkpoint: Checkpoint, rows: Sequence[Row], store: Path | None = None, processes: Processes = ALONE
) -> Floats:
    """Return the direct embeddings of prompts, L2-normalised, in their order, (N, D).

    `rows` are taken SHARD at a time, in threads, while those before are read. With `store`, the array is mapped from
    that .npy file, which is written anew, by several processes where they share it.
    """
    encoder = Encoder(checkpoint).eval()
    shape = len(rows), int(checkpoint.model.config.text_config.hidden_size)
    embedded_ND: Floats = processes.array(store, shape, np.float32)
    starts = processes.share(range(0, len(rows), SHARD))

    def read(number: int) -> list[Row]:
        return in_threads(rows.__getitem__, range(starts[number], min(starts[number] + SHARD, len(rows))))

    shards = Ahead(read, len(starts))
    for number, start in enumerate(starts):
        shard = shards(number)
        order = np.argsort([row.length for row in shard], kind="stable")
        for first in range(0, len(shard), BATCH):
            chosen = order[first : first + BATCH]
            with torch.inference_mode():
                direct_BD, _ = encoder.embed([shard[index] for index in chosen], [])
            embedded_ND[start + chosen] = F.normalize(direct_BD.float(), dim=-1).numpy(force=True)
    processes.wait()
    return embedded_ND


def _hash(parts: Iterable[str | None]) -> int:
    """Return 64 bits of some words: of ten million labels, two are alike in one case of 400,000."""
    return int.from_bytes(hashlib.blake2b(repr(list(parts)).encode(), digest_size=8).digest(), "big")
