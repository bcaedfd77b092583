"""Scores of stored vectors, and the best of them over blocks: no more than one block's scores are ever held.

Vectors are as `encode` returns them, L2-normalised, in one of its precisions. A score is the cosine: exact of float32;
of int8 what is left of it by rounding; of bits that of the query and the signs.

Axes: Q queries, D values, B rows of a block, K hits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.search.stored import Rows

BLOCK_BYTES = 2**22  # of a block as it is computed with: what caches hold, and worth a call
Score = Callable[[Any], Floats]  # of a block (B, D): (Q, B)


def block_rows(dtype: np.dtype[Any], width: int) -> int:
    """Return the rows of a block; int8 is computed with as float32."""
    return max(1, BLOCK_BYTES // (width * (1 if dtype == np.uint8 else 4)))


def cosines(queries_QD: Floats, vectors_BD: NDArray[Any]) -> Floats:
    """Return every query's score of every vector, (Q, B)."""
    if vectors_BD.dtype == np.uint8:
        signs_BD, length = np.unpackbits(vectors_BD, axis=1) * np.float32(2) - 1, math.sqrt(queries_QD.shape[1])
        return np.asarray(queries_QD @ signs_BD.T / length, np.float32)
    if vectors_BD.dtype == np.int8:
        return np.asarray(queries_QD @ vectors_BD.astype(np.float32).T / 127, np.float32)
    return np.asarray(queries_QD @ vectors_BD.T, np.float32)


def agreement(queries_QD: Floats, bits_BD: NDArray[np.uint8]) -> Floats:
    """Return the share of signs that every query has in common with every vector, (Q, B)."""
    words = np.dtype(np.uint64 if bits_BD.shape[1] % 8 == 0 else np.uint8)
    words_BW = np.ascontiguousarray(bits_BD).view(words)
    asked_QW = np.packbits(queries_QD > 0, axis=1).view(words)
    each_W = np.full(words_BW.shape[1], 1 / queries_QD.shape[1], np.float32)
    different_QB = [np.bitwise_count(words_BW ^ asked_W).astype(np.float32) @ each_W for asked_W in asked_QW]
    return 1 - np.stack(different_QB)


def nearest(
    blocks: Iterable[tuple[int, NDArray[Any]]], score: Score, queries: int, count: int, failed_N: NDArray[np.bool_]
) -> tuple[Floats, Rows]:
    """Return the best scores (Q, K) and their rows, best first; rows that failed or are not finite are left out.

    Where fewer than `count` rows are left, the scores end in minus infinity.
    """
    best_QK, rows_QK = np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64)
    for start, block in blocks:
        scores_QB = score(block)
        scores_QB[:, failed_N[start : start + len(block)]] = -np.inf
        scores_QB[np.isnan(scores_QB)] = -np.inf
        if best_QK.shape[1] == count and (scores_QB <= best_QK[:, -1:]).all():
            continue
        fresh_QB = np.broadcast_to(np.arange(start, start + len(block)), scores_QB.shape)
        best_QK, rows_QK = best(np.hstack([best_QK, scores_QB]), np.hstack([rows_QK, fresh_QB]), count)
    return best_QK, rows_QK


def best(scores_QB: Floats, rows_QB: Rows, count: int) -> tuple[Floats, Rows]:
    """Return the best scores of each row with what they belong to, best first, of equal ones the first row."""
    if scores_QB.shape[1] > count:
        chosen = np.argpartition(-scores_QB, count - 1, axis=1)[:, :count]
        scores_QB, rows_QB = np.take_along_axis(scores_QB, chosen, 1), np.take_along_axis(rows_QB, chosen, 1)
    order = np.lexsort((rows_QB, -scores_QB), axis=1)
    return np.take_along_axis(scores_QB, order, 1), np.take_along_axis(rows_QB, order, 1)
