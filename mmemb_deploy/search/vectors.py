"""A job's output, opened to be searched.

Axes: Q queries, D values, N rows, K hits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.formats import kind_of
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.search.exact import agreement, best, block_rows, cosines, nearest
from mmemb_deploy.search.index import build_index, candidates, open_index
from mmemb_deploy.search.stored import Rows, Stored, open_stored

if TYPE_CHECKING:
    from mmemb_deploy.embedder import Embedder

SECOND_LOOK = 20  # times as many rows as asked for are found by their signs and looked at again


@dataclass(frozen=True)
class Hit:
    """One row that was found."""

    score: float
    """Cosine with the query."""

    row: int
    """Its number in the file, from 0."""

    id: str
    """Its name."""

    file: str
    """The file that it comes from, as the job recorded it; "" where there is none."""

    page: int | None
    """Its page of a document, from 1."""

    second: float | None
    """The second of a video at which it begins."""


class Vectors:
    """Vectors of a file, searched where they lie.

    Example:
        vectors = Vectors.open("vectors.npz")
        (hits,) = vectors.search(embedder.encode(["three plus four"]), k=5)
    """

    def __init__(self, path: Path, stored: Stored, judge: Stored, *, indexed: bool) -> None:
        """Assemble from parts; `open` does it for files."""
        self.path, self._stored, self._judge = path, stored, judge
        self._failed_N = _failed(stored)
        self._index = open_index(stored, self._failed_N, path) if indexed else None

    @classmethod
    def open(cls, path: str | Path, *, index: bool = False, rescore: str | Path | None = None) -> Vectors:
        """Open the output of `mmemb embed`, `.npz` or `.parquet`, in any precision.

        `index` takes candidates from the index that `build_index` wrote. `rescore` is the same job's output in another
        precision, whose vectors give the final scores of what these find. Raises OptionError for a file that cannot be
        searched, an index that is missing or of other vectors, and other rows in `rescore`; MissingExtraError.
        """
        path = Path(path)
        stored = open_stored(path)
        judge = stored if rescore is None else open_stored(Path(rescore))
        if judge is not stored and (judge.rows, _dim(judge)) != (stored.rows, _dim(stored)):
            raise OptionError(
                f"rescore is {rescore}, {judge.rows} rows of {_dim(judge)} values, and {path} has {stored.rows} of "
                f"{_dim(stored)}: pass the output of the same job"
            )
        return cls(path, stored, judge, indexed=index)

    def __len__(self) -> int:
        """Count the rows, failed ones included."""
        return self._stored.rows

    @property
    def dim(self) -> int:
        """Values of a vector."""
        return _dim(self._stored)

    @property
    def precision(self) -> str:
        """The `precision` of the job: "float32", "int8" or "ubinary"."""
        return "ubinary" if self._stored.dtype == np.uint8 else self._stored.dtype.name

    def search(self, queries_QD: NDArray[Any], k: int = 10) -> list[list[Hit]]:
        """Return the hits of every query, float32 (queries, dim) as `encode` makes them, best first.

        Rows that failed are never among them, so that a list can be shorter than `k`. Raises OptionError for queries of
        another shape or dtype, and k below 1.
        """
        scores_QK, rows_QK = self.nearest(queries_QD, k)
        return [
            self._hits(scores_K[np.isfinite(scores_K)], rows_K[np.isfinite(scores_K)])
            for scores_K, rows_K in zip(scores_QK, rows_QK, strict=True)
        ]

    def nearest(self, queries_QD: NDArray[Any], k: int = 10) -> tuple[Floats, Rows]:
        """Search as `search`, and return scores (queries, k) and row numbers alone; a score without a row is -inf."""
        self._check(queries_QD, k)
        k = min(k, len(self))
        signs = self._stored.dtype == np.uint8
        if self._index is not None:
            rows_Qn = candidates(self._index, queries_QD, k)
            return self._judged(queries_QD, [rows_n[(rows_n >= 0) & ~self._failed_N[rows_n]] for rows_n in rows_Qn], k)
        looks_again = signs or self._judge is not self._stored
        count = min(SECOND_LOOK * k, len(self)) if looks_again else k
        blocks = self._stored.blocks(block_rows(self._stored.dtype, self._stored.width))
        score = partial(agreement if signs else cosines, queries_QD)
        scores_QK, rows_QK = nearest(blocks, score, len(queries_QD), count, self._failed_N)
        if not looks_again:
            return scores_QK, rows_QK
        found = [rows_K[np.isfinite(scores_K)] for scores_K, rows_K in zip(scores_QK, rows_QK, strict=True)]
        return self._judged(queries_QD, found, k)

    def build_index(self, done: Callable[[int], None] = lambda _: None) -> int:
        """Write an index beside the file, for `open(path, index=True)`; return its bytes.

        `done` hears how many more rows are in it. Raises OptionError for bits and `.parquet`; MissingExtraError.
        """
        return build_index(self._stored, self._failed_N, self.path, done)

    def fit(self, embedder: Embedder) -> int | None:
        """Return the `truncate_dim` at which an embedder's queries fit. Raises OptionError where none does."""
        dims = embedder.manifest.model.dims
        if self.dim == embedder.dim:
            return None
        if self.dim not in dims:
            raise OptionError(
                f"{self.path} holds vectors of {self.dim} values, and {embedder.manifest.model.name} makes "
                f"{' or '.join(map(str, dims))}: pass the bundle that made them"
            )
        return self.dim

    def note(self, embedder: Embedder) -> str | None:
        """Return what to know where another bundle made these vectors; None where it did not, or nothing says so."""
        if self._stored.bundle in (None, embedder.manifest.identity):
            return None
        return f"another bundle made {self.path}: scores mean something if both were exported from one checkpoint"

    def _judged(self, queries_QD: Floats, found: Sequence[Rows], k: int) -> tuple[Floats, Rows]:
        """Return the k best of the rows that were found for each query, by the vectors that judge."""
        scores_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
        rows_QK = np.full((len(queries_QD), k), -1, np.int64)
        for number, rows_n in enumerate(map(np.sort, found)):
            scores_1n = cosines(queries_QD[number : number + 1], self._judge.take(rows_n))
            scores_1K, rows_1K = best(scores_1n, rows_n[None], k)
            count = scores_1K.shape[1]
            scores_QK[number, :count], rows_QK[number, :count] = scores_1K[0], rows_1K[0]
        return scores_QK, rows_QK

    def _hits(self, scores_K: Floats, rows_K: Rows) -> list[Hit]:
        def column(name: str, otherwise: Any) -> list[Any]:
            found = self._stored.column(name, rows_K)
            return [otherwise] * len(rows_K) if found is None else found.tolist()

        names = [str(name) for name in column("id", "")]
        files = column("file", None)
        return [
            Hit(
                score,
                row,
                name,
                (name if kind_of(name) else "") if file is None else file,  # older jobs of folders had files as ids
                page or None,
                None if second is None or math.isnan(second) else second,
            )
            for score, row, name, file, page, second in zip(
                scores_K.tolist(), rows_K.tolist(), names, files, column("page", 0), column("second", None), strict=True
            )
        ]

    def _check(self, queries_QD: NDArray[Any], k: int) -> None:
        if k < 1:
            raise OptionError(f"k is {k}: ask for at least 1 hit")
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim or queries_QD.dtype != np.float32:
            raise OptionError(
                f"queries are {queries_QD.dtype} of shape {queries_QD.shape}: pass what encode([...]) returns, float32 "
                f"of (queries, {self.dim})"
            )


def _dim(stored: Stored) -> int:
    return stored.width * 8 if stored.dtype == np.uint8 else stored.width


def _failed(stored: Stored) -> NDArray[np.bool_]:
    """Return which rows have an error, (N,)."""
    errors_N = stored.column("error")
    if errors_N is None:
        return np.zeros(stored.rows, np.bool_)
    if errors_N.dtype.kind != "U":
        return np.asarray(errors_N != "")
    # the first character says it: a comparison of words would copy every message's full width
    return np.asarray(errors_N.view(np.uint32).reshape(len(errors_N), -1)[:, 0] != 0)
