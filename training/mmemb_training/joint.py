"""The joint objective of stage 3 (METHOD), as a function of what the encoder read.

    L = InfoNCE(z_r) + lambda_g (next-token loss on the rationale + on the decision) + lambda_d InfoNCE(z_d)

z_d and z_r are the direct and the reasoned embedding of a query; targets are embedded by the direct path. (The paper
does not say. UME-R1 reasons on both sides; TRACE, arXiv 2603.02929, found that candidates lose by it.) A query whose
rationales were all dropped has no z_r; the label of its decision is the stop token, or none (`Lesson.decides`).
InfoNCE is symmetric and over the negatives of all processes (`losses.info_nce`). Axes: Q queries, R of them with a
rationale, C candidates, U and V the distinct ones of both, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, pad_across_processes
from torch import Tensor

from mmemb_deploy.inputs.preprocess import Ints
from mmemb_deploy.inputs.rows import Row, RowEncoder
from mmemb_training.ahead import in_threads
from mmemb_training.encoder import Continuation, Reading
from mmemb_training.grad_cache import Chunk
from mmemb_training.losses import info_nce
from mmemb_training.recipes.settings import Objective
from mmemb_training.samples import Sample, query_row, target_row
from mmemb_training.selection.select import KeptRationales


@dataclass(frozen=True)
class Lesson:
    """A sample as a step teaches it: with one of its rationales, or with none where the model is to stop.

    Where it does not `decide`, nothing is taught of the choice between the two.
    """

    sample: Sample
    rationale: str | None
    decides: bool = True


def lesson_of(sample: Sample, kept: KeptRationales, rng: np.random.Generator) -> Lesson:
    """Return a sample with one of the rationales that it kept, or none."""
    return Lesson(sample, kept.draw(rng), kept.decides)


class JointStep:
    """One process's share of a step: its chunks for the encoder, and the loss of what came back.

    The first `hard_negatives` of a sample's negatives are read. `query_chunks` and `target_chunks` are the same for all
    processes, which run the encoder equally often.
    """

    def __init__(
        self,
        lessons: Sequence[Lesson],
        encoder: RowEncoder,
        objective: Objective,
        *,
        hard_negatives: int,
        query_chunks: int,
        target_chunks: int,
    ) -> None:
        self._objective = objective
        lessons = list(lessons)
        rows = in_threads(lambda lesson: query_row(lesson.sample.question, encoder), lessons)
        tokens = [None if lesson.rationale is None else encoder.prompt.tokenize(lesson.rationale) for lesson in lessons]
        # Alike lengths share a chunk, the rationale's first: little padding.
        order = sorted(range(len(rows)), key=lambda index: (len(tokens[index] or []), rows[index].length))
        lessons, rows = [lessons[index] for index in order], [rows[index] for index in order]
        tokens = [tokens[index] for index in order]
        self._reasons_Q = torch.tensor([path is not None for path in tokens])
        self._decides_Q = torch.tensor([lesson.decides for lesson in lessons])
        self._words = sum(len(path) + 1 for path in tokens if path is not None)  # that are predicted, with `</think>`
        self._wanted = [lesson.sample.wanted for lesson in lessons]
        targets = [lesson.sample.target for lesson in lessons]
        targets += [negative for lesson in lessons for negative in lesson.sample.negatives[:hard_negatives]]
        self._labels = [target.labels for target in targets]
        target_rows = in_threads(lambda target: target_row(target, encoder), targets)
        self._digests = [_digest(row) for row in rows], [_digest(row) for row in target_rows]
        self._query_chunks = [
            Chunk([rows[index] for index in indices], _paths([tokens[index] for index in indices]))
            for indices in _split(len(rows), query_chunks)
        ]
        self._target_chunks = [
            Chunk([target_rows[index] for index in indices], []) for indices in _split(len(targets), target_chunks)
        ]

    @property
    def chunks(self) -> list[Chunk]:
        """What the encoder is to read: the queries, then the targets."""
        return [*self._query_chunks, *self._target_chunks]

    def loss(self, readings: Sequence[Reading], accelerator: Accelerator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this process's part of the loss, whose gradients add up to the whole's, and the whole's terms."""
        objective = self._objective
        queries, targets = readings[: len(self._query_chunks)], readings[len(self._query_chunks) :]
        reasons_Q = self._reasons_Q.to(queries[0].direct_BD.device)
        direct_QD = torch.cat([reading.direct_BD for reading in queries])
        decision_Q2 = torch.cat([reading.decision_B2 for reading in queries])
        reasoned_RD = torch.cat([reading.reasoned_RD for reading in queries])
        logprob_R = torch.cat([reading.logprobs_RT.sum(dim=1) for reading in queries])
        real_R = self._real_paths().to(reasons_Q.device)
        reasoned_RD, logprob_R = reasoned_RD[real_R], logprob_R[real_R]
        everyone_QD, everyone_RD = _gather(direct_QD, accelerator), _gather(reasoned_RD, accelerator)
        candidates_CD = _gather(torch.cat([reading.direct_BD for reading in targets]), accelerator)
        relevant_QC, copies_Q, copies_C = (part.to(direct_QD.device) for part in self._relevance(accelerator))
        reasons_everyone_Q = _gather(reasons_Q, accelerator)
        decides_Q = self._decides_Q.to(reasons_Q.device)
        total = _sum(torch.tensor([self._words, int(decides_Q.sum())], device=direct_QD.device), accelerator)
        label_Q = (~reasons_Q).long()[:, None]
        contrast = partial(info_nce, temperature=objective.temperature, dims=objective.dims, copies_C=copies_C)
        reasoned = relevant_QC[reasons_everyone_Q]
        terms = {
            "direct": contrast(everyone_QD, candidates_CD, relevant_QC, copies_Q=copies_Q),
            "reasoned": contrast(everyone_RD, candidates_CD, reasoned),  # rationales tell equal questions apart
            "rationale": -logprob_R.sum() / total[0].clamp(min=1),
            "decision": -(decision_Q2.gather(1, label_Q)[:, 0] * decides_Q).sum() / total[1].clamp(min=1),
        }
        loss = objective.total(terms)
        for name in ("rationale", "decision"):
            terms[name] = _sum(terms[name].detach(), accelerator)
        return loss, {name: term.detach() for name, term in terms.items()}

    def _real_paths(self) -> Tensor:
        """Return which paths are a lesson's own, and not the empty one that fills a chunk without any."""
        parts = torch.split(self._reasons_Q, [len(chunk.rows) for chunk in self._query_chunks])
        return torch.cat([torch.ones(int(part.sum()), dtype=torch.bool) if part.any() else part[:1] for part in parts])

    def _relevance(self, accelerator: Accelerator) -> tuple[Tensor, Tensor, Tensor]:
        """Return which candidates answer which queries, (Q, C), and how often each of both is there, (Q,) and (C,).

        By their labels, and by what is read: what reads the same as an answer is one, whatever its label.
        """
        everyone = gather_object if accelerator.num_processes > 1 else list
        wanted, labels = everyone(self._wanted), everyone(self._labels)
        labelled_QC = np.array([[one in found for found in labels] for one in wanted], np.int64)
        (same_Q, copies_Q), (same_C, copies_C) = (_copies(everyone(digests)) for digests in self._digests)
        relevant_UV = np.zeros((same_Q.max() + 1, same_C.max() + 1), np.int64)
        np.maximum.at(relevant_UV, (same_Q[:, None], same_C), labelled_QC)
        relevant_QC = relevant_UV[same_Q[:, None], same_C].astype(bool)
        return torch.from_numpy(relevant_QC), torch.from_numpy(copies_Q), torch.from_numpy(copies_C)


def _digest(row: Row) -> bytes:
    """Return a hash of what the encoder reads of a prompt."""
    pixels = [visual.pixels_THWC for visual in row.visuals]
    shapes = repr([one.shape for one in pixels]).encode()
    parts = [row.token_ids_S.tobytes(), shapes, *(one.tobytes() for one in pixels)]
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _copies(digests: Sequence[bytes]) -> tuple[Ints, Ints]:
    """Return which of the distinct ones each is, and how often that one is there."""
    distinct = {digest: place for place, digest in enumerate(dict.fromkeys(digests))}
    which: Ints = np.array([distinct[digest] for digest in digests], np.int64)
    return which, np.bincount(which)[which]


def _paths(tokens: Sequence[list[int] | None]) -> list[Continuation]:
    """Return the paths of a chunk; one without any gets an empty one, so that all processes run the same layers."""
    found = [Continuation(index, path) for index, path in enumerate(tokens) if path is not None]
    return found or [Continuation(0, [])]


def _split(count: int, chunks: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.arange(count), chunks)]


def _gather(local: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the rows of all processes in their order; gradients reach the process's own rows alone."""
    if accelerator.num_processes == 1:
        return local
    lengths: Any = accelerator.gather(torch.tensor([len(local)], device=local.device))
    counts: list[int] = lengths.tolist()
    padded: Any = accelerator.gather(pad_across_processes(local.detach(), dim=0))
    pieces = [piece[:count] for piece, count in zip(padded.chunk(len(counts)), counts, strict=True)]
    pieces[accelerator.process_index] = local
    return torch.cat(pieces)


def _sum(local: Tensor, accelerator: Accelerator) -> Tensor:
    total: Any = accelerator.reduce(local, "sum")
    return cast("Tensor", total)
