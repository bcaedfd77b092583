"""An index beside a file of vectors: lists of what lies near the same centre (IVF), in 8 bits, by faiss.

It names candidates, which the stored vectors then judge. It is mapped into memory too: a search reads the lists that it
visits. Rows that failed lie in it as zeros, so that its numbers are those of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.errors import MissingExtraError, OptionError
from mmemb_deploy.files import whole
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.search.exact import cosines
from mmemb_deploy.search.stored import Rows, Stored

TRAINED_ON = 64  # rows for each list, at most
VISITED = 32  # lists that a query looks into
FEWEST = 50  # candidates that the stored vectors judge, at least
CHUNK = 16384  # rows that are added together
LOOKED_AT = 4  # rows that must be found where the file has them
SAME = 0.99  # cosine of a vector and what 8 bits keep of it


def index_path(vectors: Path) -> Path:
    """Return where the index of a file of vectors lies."""
    return vectors.with_name(vectors.name + ".faiss")


def build_index(stored: Stored, failed_N: NDArray[np.bool_], path: Path, done: Callable[[int], None]) -> int:
    """Write the index of a file's vectors; return its bytes. `done` hears how many more rows are in it.

    Raises OptionError for bits, for `.parquet`, and where every row failed; MissingExtraError without faiss.
    """
    faiss = _faiss(stored, path)
    good_n = np.flatnonzero(~failed_N)
    lists = max(1, math.isqrt(len(good_n)))
    sample_n = good_n[:: max(1, len(good_n) // (TRAINED_ON * lists))]
    if not len(sample_n):
        raise OptionError(f"{path} holds no row that did not fail")
    index = trained_index(_floats(stored.take(sample_n)), lists)
    for _, block in stored.blocks(CHUNK):
        index.add(_floats(block))
        done(len(block))
    with whole(index_path(path)) as new:
        faiss.write_index(index, str(new))
        return new.stat().st_size


def trained_index(sample_ND: Floats, lists: int) -> Any:
    """Return an index of so many lists, empty, its centres and its 8 bits as a sample of float32 vectors asks.

    Raises MissingExtraError without faiss.
    """
    faiss = load_faiss()
    index = faiss.index_factory(sample_ND.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(sample_ND)
    return index


def open_index(stored: Stored, failed_N: NDArray[np.bool_], path: Path) -> Any:
    """Map the index of a file of vectors.

    Raises OptionError where there is none, or one of other vectors; MissingExtraError without faiss.
    """
    faiss = _faiss(stored, path)
    file = index_path(path)
    if not file.is_file():
        raise OptionError(f"{file} is not there: write it by `mmemb index {path}`, or search without an index")
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise OptionError(f"{file} is no whole index: write it again by `mmemb index {path}`") from error
    index.nprobe = VISITED
    if (index.ntotal, index.d) != (stored.rows, stored.width) or not _finds(index, stored, failed_N):
        raise OptionError(f"{file} is no index of {path} as it is now: write it again by `mmemb index {path}`")
    return index


def candidates(index: Any, queries_QD: Floats, count: int) -> Rows:
    """Return the rows that the index takes for each query's nearest, more than `count`, (Q, n); -1 is none."""
    _, rows_Qn = index.search(queries_QD, max(FEWEST, 4 * count))
    found: Rows = rows_Qn
    return found


def _finds(index: Any, stored: Stored, failed_N: NDArray[np.bool_]) -> bool:
    """Whether some rows of the file are found by their own vectors."""
    good_n = np.flatnonzero(~failed_N)
    rows_n = good_n[np.linspace(0, len(good_n) - 1, LOOKED_AT).astype(np.int64)]
    vectors_ND = _floats(stored.take(rows_n))
    _, found_n1 = index.search(vectors_ND, 1)
    return bool((np.diag(cosines(vectors_ND, stored.take(found_n1[:, 0]))) > SAME).all())


def _floats(vectors_BD: NDArray[Any]) -> Floats:
    """Return vectors as float32 of length 1, those of rows that failed as zeros."""
    one = 127 if vectors_BD.dtype == np.int8 else 1
    return np.nan_to_num(np.asarray(vectors_BD / np.float32(one), np.float32))


def _faiss(stored: Stored, path: Path) -> Any:
    if path.suffix != ".npz":
        raise OptionError(f"{path} has no index: that needs .npz, of which single rows are read; search it without")
    if stored.dtype == np.uint8:
        raise OptionError(f"{path} holds bits, which are searched as they are: leave the index out")
    return load_faiss()


def load_faiss() -> Any:
    """Return faiss. Raises MissingExtraError without it."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise MissingExtraError("faiss", "search") from error
    return faiss
