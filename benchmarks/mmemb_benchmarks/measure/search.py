"""Ways to search the same vectors, side by side: how many of the right ones they find, and how long they take.

Axes: N rows, D values, Q queries, K hits.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mmemb_benchmarks.timing import timed
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.jobs.parts import write_member
from mmemb_deploy.search.index import index_path, load_faiss
from mmemb_deploy.search.vectors import Vectors

K = 10
TOGETHER = 32  # queries of a batch
SUBTOPIC, TOPIC = 50, 5000  # rows
DATA = (
    f"a vector is the sum of a topic's, a subtopic's and its own part, of equal variance, {SUBTOPIC} rows to a "
    f"subtopic and {TOPIC} to a topic; variances fall as 1 / (1 + i / 8) along axes turned at random; queries alike"
)
NUMPY, FLAT = "numpy", "faiss, flat"  # a product of matrices; IndexFlatIP
CHUNK = 16384  # rows that are made and written together

Search = Callable[[Floats], NDArray[np.int64]]  # of queries (Q, D): row numbers (Q, K)


class Way(BaseModel, frozen=True):
    """What one way to search finds and takes; times are medians."""

    recall_at_10: float  # share of the ten nearest, by float32, that are among its ten
    alone_ms: float  # a query that comes alone
    together_ms: float  # a query of TOGETHER that come together
    times_numpy: float  # how many times faster than numpy a query alone is
    bytes: int  # of what is searched


class Setting(BaseModel, frozen=True):
    """The ways over as many vectors of a size, and the seconds that building the index took."""

    rows: int
    dim: int
    index_seconds: float
    ways: dict[str, Way]


class SearchResult(BaseModel, frozen=True):
    """`mmemb bench search`."""

    data: str
    queries: int
    settings: list[Setting]


def measure_search(
    sizes: Sequence[tuple[int, int]], *, queries: int, seed: int, report: Callable[[str], None]
) -> SearchResult:
    """Measure each size, (rows, dim), in files of a temporary folder that the system has just written.

    Raises MissingExtraError without faiss.
    """
    settings: list[Setting] = []
    for rows, dim in sizes:
        report(f"{rows} vectors of {dim}")
        with TemporaryDirectory() as folder:
            settings.append(_measure(rows, dim, queries, seed, Path(folder)))
    return SearchResult(data=DATA, queries=queries, settings=settings)


def clustered(rows: int, dim: int, queries: int, seed: int) -> tuple[Floats, Floats]:
    """Return vectors (rows, dim) and queries (queries, dim), L2-normalised, made as DATA says."""
    rng = np.random.default_rng(seed)
    scale_D = np.sqrt(1 / (1 + np.arange(dim, dtype=np.float32) / 8))
    turned_DD = np.linalg.qr(rng.standard_normal((dim, dim), np.float32))[0] * scale_D[:, None]
    parts = [rng.standard_normal((math.ceil(rows / size), dim), np.float32) @ turned_DD for size in (TOPIC, SUBTOPIC)]

    def drawn(subtopics_n: NDArray[np.int64]) -> Floats:
        own = rng.standard_normal((len(subtopics_n), dim), np.float32) @ turned_DD
        own += parts[0][subtopics_n * SUBTOPIC // TOPIC] + parts[1][subtopics_n]
        return np.asarray(own / np.linalg.norm(own, axis=1, keepdims=True), np.float32)

    vectors_ND = np.empty((rows, dim), np.float32)
    order_N = rng.permutation(rows)
    for start in range(0, rows, CHUNK):
        vectors_ND[start : start + CHUNK] = drawn(order_N[start : start + CHUNK] // SUBTOPIC)
    return vectors_ND, drawn(rng.integers(rows, size=queries) // SUBTOPIC)


def _measure(rows: int, dim: int, queries: int, seed: int, folder: Path) -> Setting:
    vectors_ND, queries_QD = clustered(rows, dim, queries, seed)
    flat = _flat(vectors_ND)
    paths = {name: folder / f"{name}.npz" for name in ("float32", "int8", "ubinary")}
    _write(paths["float32"], vectors_ND)
    _write(paths["int8"], np.rint(vectors_ND * 127).astype(np.int8))
    _write(paths["ubinary"], np.packbits(vectors_ND > 0, axis=1))
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    built, index_seconds = timed(Vectors.open(paths["float32"]).build_index)
    assert built == index_path(paths["float32"]).stat().st_size

    def product(queries_QD: Floats) -> NDArray[np.int64]:
        scores_QN = queries_QD @ vectors_ND.T
        best_QK = np.argpartition(scores_QN, -K, axis=1)[:, -K:]
        order_QK = np.argsort(-np.take_along_axis(scores_QN, best_QK, 1), axis=1)
        return np.take_along_axis(best_QK, order_QK, 1)

    ways: dict[str, tuple[int, Search]] = {
        NUMPY: (vectors_ND.nbytes, product),
        FLAT: (vectors_ND.nbytes, lambda queries_QD: flat.search(queries_QD, K)[1]),
        "float32, exact": (sizes["float32"], _rows(Vectors.open(paths["float32"]))),
        "int8, exact": (sizes["int8"], _rows(Vectors.open(paths["int8"]))),
        "ubinary": (sizes["ubinary"], _rows(Vectors.open(paths["ubinary"]))),
        "ubinary + int8": (
            sizes["ubinary"] + sizes["int8"],
            _rows(Vectors.open(paths["ubinary"], rescore=paths["int8"])),
        ),
        "ubinary + float32": (
            sizes["ubinary"] + sizes["float32"],
            _rows(Vectors.open(paths["ubinary"], rescore=paths["float32"])),
        ),
        "index + float32": (sizes["float32"] + built, _rows(Vectors.open(paths["float32"], index=True))),
    }
    right_QK = product(queries_QD)
    found = {name: search(queries_QD) for name, (_, search) in ways.items()}  # which warms up too
    alone: dict[str, list[float]] = {name: [] for name in ways}
    together: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(queries):  # in turns, so that a machine that slows down slows all
        for name, (_, search) in ways.items():
            alone[name].append(timed(search, queries_QD[number : number + 1])[1])
    for start in range(0, queries - TOGETHER + 1, TOGETHER):
        for name, (_, search) in ways.items():
            together[name].append(timed(search, queries_QD[start : start + TOGETHER])[1] / TOGETHER)
    return Setting(
        rows=rows,
        dim=dim,
        index_seconds=index_seconds,
        ways={
            name: Way(
                recall_at_10=_recall(found[name], right_QK),
                alone_ms=1000 * median(alone[name]),
                together_ms=1000 * median(together[name]),
                times_numpy=median(alone[NUMPY]) / median(alone[name]),
                bytes=size,
            )
            for name, (size, _) in ways.items()
        },
    )


def _write(path: Path, vectors_ND: NDArray[Any]) -> None:
    """Write vectors alone, as a job does."""
    chunks = (vectors_ND[start : start + CHUNK] for start in range(0, len(vectors_ND), CHUNK))
    with zipfile.ZipFile(path, "w") as archive:
        write_member(archive, "embedding", vectors_ND.dtype, vectors_ND.shape, chunks)


def _rows(vectors: Vectors) -> Search:
    return lambda queries_QD: vectors.nearest(queries_QD, K)[1]


def _recall(found_QK: NDArray[np.int64], right_QK: NDArray[np.int64]) -> float:
    shared = (len(set(found) & set(right)) for found, right in zip(found_QK.tolist(), right_QK.tolist(), strict=True))
    return sum(shared) / right_QK.size


def _flat(vectors_ND: Floats) -> Any:
    flat = load_faiss().IndexFlatIP(vectors_ND.shape[1])
    flat.add(vectors_ND)
    return flat
