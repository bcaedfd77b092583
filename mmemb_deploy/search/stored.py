"""The two forms in which a job's rows are stored, read without holding them all: `.npz`, mapped, and `.parquet`.

Axes: N rows of the file, n some of them, D values of a vector as they are stored (bits: 8 to a value).
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mmemb_deploy.errors import OptionError
from mmemb_deploy.jobs.parts import MADE_BY
from mmemb_deploy.jobs.readers import load_pyarrow

DTYPES = ("float32", "int8", "uint8")
LOCAL_HEADER = 30  # bytes of a zip member's header before its name
Rows = NDArray[np.int64]


class Stored(Protocol):
    """Rows of vectors and their columns. `dtype` is float32, int8 or uint8, which holds 8 signs a value."""

    rows: int
    width: int  # D
    dtype: np.dtype[Any]
    bundle: str | None  # identity of what made them, where the file says so

    def blocks(self, size: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the vectors in order, at most `size` rows at a time: the first one's number and (n, D)."""
        ...

    def take(self, rows_n: Rows) -> NDArray[Any]:
        """Return some rows' vectors, (n, D)."""
        ...

    def column(self, name: str, rows_n: Rows | None = None) -> NDArray[Any] | None:
        """Return a column, of all rows or of some, or None where the file has none of that name."""
        ...


def open_stored(path: Path) -> Stored:
    """Open what `mmemb embed` wrote.

    Raises OptionError for a file that is missing, of another form, or without rows of vectors; MissingExtraError for
    `.parquet` without pyarrow.
    """
    if not path.is_file():
        raise OptionError(f"{path} is no file: pass the output of `mmemb embed`")
    if path.suffix not in (".npz", ".parquet"):
        raise OptionError(f"{path} ends in {path.suffix!r}: vectors are read from .npz and .parquet")
    stored: Stored = Npz(path) if path.suffix == ".npz" else Parquet(path)
    if stored.dtype.name not in DTYPES:
        raise OptionError(f"{path} holds vectors of {stored.dtype}: expected {', '.join(DTYPES)}")
    if not stored.rows or not stored.width:
        raise OptionError(f"{path} holds no vectors")
    return stored


class Npz:
    """A `.npz` file, whose arrays are mapped into memory where they lie in the archive."""

    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                self.bundle = archive.comment.decode() or None
        except zipfile.BadZipFile as error:
            raise OptionError(f"{path} is no whole .npz file: {error}") from error
        if "embedding" not in members:
            raise OptionError(f"{path} has no array 'embedding', only {', '.join(sorted(members))}")
        self._path, self._members = path, members
        self._vectors_ND = self._mapped("embedding")
        if self._vectors_ND.ndim != 2:
            raise OptionError(f"{path} has an 'embedding' of shape {self._vectors_ND.shape}: expected (rows, values)")
        self.rows, self.width = self._vectors_ND.shape
        self.dtype = self._vectors_ND.dtype

    def blocks(self, size: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield blocks; see Stored."""
        for start in range(0, self.rows, size):
            # what does not begin at a multiple of its item's size, numpy multiplies by hand, 40 times slower
            yield start, np.require(self._vectors_ND[start : start + size], requirements="A")

    def take(self, rows_n: Rows) -> NDArray[Any]:
        """Return vectors; see Stored."""
        taken: NDArray[Any] = self._vectors_ND[rows_n]
        return taken

    def column(self, name: str, rows_n: Rows | None = None) -> NDArray[Any] | None:
        """Return a column; see Stored."""
        if name not in self._members:
            return None
        column = self._mapped(name)
        if len(column) != self.rows:
            raise OptionError(f"{self._path}: {name!r} has {len(column)} rows, and 'embedding' {self.rows}")
        return column if rows_n is None else column[rows_n]

    def _mapped(self, name: str) -> NDArray[Any]:
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED:
            raise OptionError(f"{self._path} is compressed, and is searched where it lies: write it by numpy.savez")
        with self._path.open("rb") as file:
            file.seek(member.header_offset + LOCAL_HEADER - 4)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            file.seek(name_bytes + extra_bytes, 1)
            try:
                version = npy.read_magic(file)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, fortran, dtype = read(file)
            except ValueError as error:
                raise OptionError(f"{self._path}: {name!r} is no array: {error}") from error
            if dtype.hasobject or fortran:
                raise OptionError(f"{self._path}: {name!r} holds Python objects, or columns before rows")
            if 0 in shape or not dtype.itemsize:
                return np.empty(shape, dtype)
            return np.memmap(self._path, dtype, "r", file.tell(), shape)


class Parquet:
    """A `.parquet` file, whose row groups are read one after another."""

    def __init__(self, path: Path) -> None:
        pyarrow, parquet = load_pyarrow()
        try:
            self._file: Any = parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise OptionError(f"{path} is no whole .parquet file: {error}") from error
        self._path = path
        self._names: Sequence[str] = self._file.schema_arrow.names
        made_by: bytes | None = (self._file.schema_arrow.metadata or {}).get(MADE_BY.encode())
        self.bundle = None if made_by is None else made_by.decode()
        if "embedding" not in self._names:
            raise OptionError(f"{path} has no column 'embedding', only {', '.join(sorted(self._names))}")
        kind = self._file.schema_arrow.field("embedding").type
        if not hasattr(kind, "value_type"):
            raise OptionError(f"{path} has an 'embedding' of {kind}: expected lists of numbers")
        self.dtype = np.dtype(kind.value_type.to_pandas_dtype())
        self.rows: int = self._file.metadata.num_rows
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        first = next(self._file.iter_batches(1, columns=["embedding"]), None)
        self.width = 0 if first is None else len(first.column(0).flatten())

    def blocks(self, size: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield blocks; see Stored."""
        start = 0
        for batch in self._file.iter_batches(size, columns=["embedding"]):
            yield start, self._vectors(batch.column(0))
            start += len(batch)

    def take(self, rows_n: Rows) -> NDArray[Any]:
        """Return vectors; see Stored."""
        taken = np.empty((len(rows_n), self.width), self.dtype)
        for chosen, table, within in self._groups(["embedding"], rows_n):
            taken[chosen] = self._vectors(table.column(0).combine_chunks())[within]
        return taken

    def column(self, name: str, rows_n: Rows | None = None) -> NDArray[Any] | None:
        """Return a column; see Stored."""
        if name not in self._names:
            return None
        if rows_n is None:
            whole: NDArray[Any] = self._file.read([name]).column(0).to_numpy()
            return whole
        found: list[Any] = [None] * len(rows_n)
        for chosen, table, within in self._groups([name], rows_n):
            for place, value in zip(chosen.tolist(), table.column(0).take(within).to_pylist(), strict=True):
                found[place] = value
        return np.array(found)

    def _groups(self, names: list[str], rows_n: Rows) -> Iterator[tuple[Rows, Any, Rows]]:
        """Yield, for each row group that has some of the rows: their places among them, the group, theirs in it."""
        groups_n = np.searchsorted(self._starts, rows_n, side="right") - 1
        for group in np.unique(groups_n).tolist():
            chosen = np.flatnonzero(groups_n == group)
            yield chosen, self._file.read_row_group(group, names), rows_n[chosen] - self._starts[group]

    def _vectors(self, lists: Any) -> NDArray[Any]:
        flat = lists.flatten()
        if lists.null_count or flat.null_count or len(flat) != len(lists) * self.width:
            raise OptionError(f"{self._path} has an 'embedding' that is missing, or not of {self.width} values")
        vectors: NDArray[Any] = flat.to_numpy().reshape(-1, self.width)
        return vectors
