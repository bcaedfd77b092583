"""Hard negatives: for every question, the wrong targets that are most similar to it, found by faiss.

Up to EXACT_UP_TO targets every one is compared; beyond, an index of lists (IVF, 8 bits) names some, whose stored
embeddings are then compared, so that what it misses is the whole difference: `benchmarks/scale.py` measures it.
Axes: Q questions, C distinct targets, D embedding size, K targets looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.inputs.preprocess import Ints
from mmemb_deploy.search.index import TRAINED_ON, VISITED, load_faiss, trained_index
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.processes import ALONE, Processes
from mmemb_training.samples import Lazy, Sample, query_row
from mmemb_training.selection.bank import Floats, TargetBank, embed_rows

EXACT_UP_TO = 100_000  # targets
BLOCK = 1024  # questions, or rows of an index, at a time
WIDER = 4  # times as many are looked at where too few can be taken
MOST_LOOKED_AT = 4096  # of an index of lists; a question that can take too few of these has fewer hard negatives

Nearest = Callable[[Floats, int], tuple[Floats, Ints]]  # queries and K to cosines and rows, (Q, K), the nearest first
NONE = -1  # a row where there is no further one


def mine_negatives(
    samples: Sequence[Sample],
    bank: TargetBank,
    checkpoint: Checkpoint,
    *,
    hard: int,
    even: int = 0,
    share_of_positive: float | None = 0.95,
    seed: int = 0,
    store: Path | None = None,
    processes: Processes = ALONE,
) -> Sequence[Sample]:
    """Return the samples with more negatives: the `hard` most similar targets of others, and `even` drawn evenly.

    A target that answers the question by its labels is never a negative. Labels miss some, so a target whose cosine
    exceeds `share_of_positive` times that of the question's own target is not taken as a hard one (NV-Retriever, arXiv
    2407.15831); None trusts the labels. Questions are embedded into `store`, a .npy file, where one is given, and their
    negatives' rows lie beside it; several processes share the work. Raises MissingExtraError without faiss.
    """
    rows = Lazy(len(samples), lambda index: query_row(samples[index].question, checkpoint.rows))
    queries_QD = embed_rows(checkpoint, rows, store, processes)
    nearest, most = nearest_of(bank.embeddings_CD)
    count, beside = len(bank.targets), None if store is None else store.with_suffix(".negatives.npy")
    negatives_QN = processes.array(beside, (len(samples), hard + even), np.int32)
    for start in processes.share(range(0, len(samples), BLOCK)):
        rng = np.random.default_rng([seed, start])
        block = range(start, min(start + BLOCK, len(samples)))
        answers = [bank.answers(samples[index].wanted) for index in block]
        own_Q = np.array([bank.index(samples[index].target) for index in block])
        query_QD = np.asarray(queries_QD[block.start : block.stop])
        bound_Q = np.full(len(block), np.inf, np.float32)
        if share_of_positive is not None:
            bound_Q = share_of_positive * np.einsum("qd,qd->q", query_QD, bank.embeddings_CD[own_Q])
        hardest = _hardest(query_QD, answers, bound_Q, nearest, min(most, count), hard)
        for index, wrong_not, found in zip(block, answers, hardest, strict=True):
            drawn = drawn_evenly(count, np.union1d(wrong_not, found), even, rng)
            rows_N = np.concatenate([found, drawn])
            negatives_QN[index] = np.pad(rows_N, (0, hard + even - len(rows_N)), constant_values=NONE)
    processes.wait()

    def mined(index: int) -> Sample:
        sample = samples[index]
        found = (bank.targets[row] for row in negatives_QN[index] if row != NONE)
        return replace(sample, negatives=(*sample.negatives, *found))

    return Lazy(len(samples), mined)


def nearest_of(embeddings_CD: Floats, exact_up_to: int = EXACT_UP_TO) -> tuple[Nearest, int]:
    """Return what finds the nearest of some embeddings, and how many of them it can be asked for at most."""
    count, faiss = len(embeddings_CD), load_faiss()
    if count <= exact_up_to:
        return lambda query_QD, most: faiss.knn(query_QD, embeddings_CD, most, faiss.METRIC_INNER_PRODUCT), count
    lists = math.isqrt(count)
    index = trained_index(np.asarray(embeddings_CD[:: max(1, count // (TRAINED_ON * lists))]), lists)
    for start in range(0, count, BLOCK):
        index.add(np.asarray(embeddings_CD[start : start + BLOCK]))
    index.nprobe = VISITED

    def nearest(query_QD: Floats, most: int) -> tuple[Floats, Ints]:
        _, row_QK = index.search(query_QD, most)
        cosine_QK = np.full(row_QK.shape, -np.inf, np.float32)
        for number, (query_D, row_K) in enumerate(zip(query_QD, row_QK, strict=True)):
            found = row_K != NONE
            cosine_QK[number, found] = embeddings_CD[row_K[found]] @ query_D
        order_QK = np.argsort(-cosine_QK, axis=1, kind="stable")
        return np.take_along_axis(cosine_QK, order_QK, 1), np.take_along_axis(row_QK, order_QK, 1)

    return nearest, MOST_LOOKED_AT


def _hardest(
    query_QD: Floats, answers: Sequence[Ints], bound_Q: Floats, nearest: Nearest, most: int, hard: int
) -> list[Ints]:
    """Return each question's most similar targets that are no answers and within its bound, at most `hard`."""
    found = [np.empty(0, np.int64)] * len(answers)
    waiting = np.arange(len(answers) if hard else 0)
    looked_at = min(most, WIDER * (hard + 1))
    while len(waiting):
        cosine_QK, row_QK = nearest(query_QD[waiting], looked_at)
        short = []
        for index, cosine_K, row_K in zip(waiting.tolist(), cosine_QK, row_QK, strict=True):
            taken_K = (row_K != NONE) & (cosine_K <= bound_Q[index]) & ~np.isin(row_K, answers[index])
            found[index] = row_K[taken_K][:hard]
            if len(found[index]) < hard and row_K[-1] != NONE:
                short.append(index)
        if looked_at == most:
            break
        waiting, looked_at = np.array(short, np.int64), min(most, WIDER * looked_at)
    return found


def drawn_evenly(count: int, without: NDArray[np.int64], size: int, rng: np.random.Generator) -> Ints:
    """Draw `size` distinct numbers below `count`, none of `without`, which ascends; all of them where they are fewer.

    It takes no longer for a million than for a thousand.
    """
    left = count - len(without)
    drawn: Ints = rng.choice(left, size=min(size, left), replace=False)
    for one in without:
        drawn += drawn >= one
    return drawn
