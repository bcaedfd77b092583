"""The columns of a job's rows: written chunk by chunk, and made one file without holding more than a chunk.

A chunk is a `.npz` of its own. Of them comes a `.npz` whose members are stored uncompressed, `embedding` so that it can
be mapped into memory where it lies, or a `.parquet` whose `embedding` is a list of fixed size.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mmemb_deploy.files import whole
from mmemb_deploy.jobs.readers import load_pyarrow
from mmemb_deploy.jobs.records import Record
from mmemb_deploy.results import EncodeResult

WORDS = ("id", "file", "route", "rationale", "rationale_source", "fallback", "error")
COLUMNS = (
    "id",
    "file",
    "page",
    "second",
    "embedding",
    "route",
    "gate_score",
    "rationale",
    "rationale_source",
    "rationale_tokens",
    "truncated",
    "fallback",
    "error",
)
MADE_BY = "mmemb.bundle"  # the key of a parquet file's metadata under which its bundle's identity lies
REPEATED = ["file", "route", "rationale_source", "fallback", "error"]  # columns of which a dictionary is worth keeping
ROW_GROUP = 64  # chunks
ALIGNMENT = 64  # bytes; what numpy's own files keep
# Bytes of a zip's member before its content: fixed ones, a padding's kind and length, 64-bit sizes.
HEADER = 30 + 4 + 20
PADDED = 0xD935  # the kind of a header's field that is a padding, as Android's zipalign writes it

Columns = dict[str, NDArray[Any]]


def write_part(part: Path, records: Sequence[Record], results: Sequence[EncodeResult]) -> None:
    """Write what became of a chunk, whole or not at all; `results` are those of its rows in order."""
    details = [detail for result in results for detail in result.details]
    errors = [error for result in results for error in _errors(result)]
    columns = {
        "id": np.array([record.id for record in records]),
        "file": np.array([record.file for record in records]),
        "page": np.array([record.page for record in records], np.int32),
        "second": np.array([record.second for record in records], np.float32),
        "embedding": np.concatenate([result.embeddings for result in results]),
        "route": np.array([detail.route.value if detail else "" for detail in details]),
        "gate_score": np.array([detail.gate_score if detail else np.nan for detail in details], np.float32),
        "rationale": np.array([(detail.rationale or "") if detail else "" for detail in details]),
        "rationale_source": np.array([(detail.rationale_source or "") if detail else "" for detail in details]),
        "rationale_tokens": np.array([detail.rationale_tokens if detail else 0 for detail in details], np.int64),
        "truncated": np.array([bool(detail and detail.truncated) for detail in details]),
        "fallback": np.array([(detail.fallback or "") if detail else "" for detail in details]),
        "error": np.array(errors),
    }
    with whole(part) as new, zipfile.ZipFile(new, "w") as archive:  # numpy's savez takes no column named "file"
        for name, values in columns.items():
            write_member(archive, name, values.dtype, values.shape, [values])


def _errors(result: EncodeResult) -> list[str]:
    messages = {error.index: error.message for error in result.errors}
    return [messages.get(index, "") for index in range(len(result.details))]


def read_part(part: Path, names: Sequence[str] = COLUMNS) -> Columns:
    """Return some of a chunk's columns."""
    with np.load(part, allow_pickle=False) as archive:
        return {name: archive[name] for name in names}


def write_npz(target: Path, parts: Sequence[Path], rows: int, bundle: str) -> None:
    """Write the columns of all parts one after another, each chunk by chunk; the zip's comment says what made them."""
    with zipfile.ZipFile(target, "w") as archive:
        archive.comment = bundle.encode()
        for name in COLUMNS:
            first = read_part(parts[0], [name])[name]
            dtype = first.dtype
            if name in WORDS:  # whose width is that of the longest
                dtype = max((each.dtype for each in _column(parts, name)), key=lambda each: each.itemsize)
            write_member(archive, name, dtype, (rows, *first.shape[1:]), _column(parts, name))


def _column(parts: Sequence[Path], name: str) -> Iterator[NDArray[Any]]:
    return (read_part(part, [name])[name] for part in parts)


def write_member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], chunks: Iterable[NDArray[Any]]
) -> None:
    """Write chunks as one column of a `.npz`, where it can be mapped into memory."""
    described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(_aligned(archive, f"{name}.npy"), "w", force_zip64=True) as member:
        npy.write_array_header_1_0(member, described)  # a multiple of ALIGNMENT long
        for chunk in chunks:
            member.write(np.ascontiguousarray(chunk, dtype).tobytes())


def _aligned(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return a member whose content begins at a multiple of ALIGNMENT, by a padding in its header."""
    padding = -(archive.start_dir + HEADER + len(name)) % ALIGNMENT
    member = zipfile.ZipInfo(name)
    member.extra = struct.pack("<HH", PADDED, padding) + bytes(padding)
    return member


def write_parquet(target: Path, parts: Sequence[Path], bundle: str) -> None:
    """Write the rows of all parts, in row groups of ROW_GROUP chunks; the schema's metadata say what made them."""
    pyarrow, parquet = load_pyarrow()
    first = read_part(parts[0], ["embedding"])["embedding"]
    vector = pyarrow.list_(pyarrow.from_numpy_dtype(first.dtype), first.shape[1])
    types = {name: pyarrow.string() for name in WORDS} | {"embedding": vector}
    schema = pyarrow.schema(
        [(name, types.get(name) or pyarrow.from_numpy_dtype(each.dtype)) for name, each in read_part(parts[0]).items()],
        metadata={MADE_BY: bundle},
    )
    with parquet.ParquetWriter(target, schema, use_dictionary=REPEATED) as writer:
        for start in range(0, len(parts), ROW_GROUP):
            chunks = [_batch(pyarrow, schema, read_part(part)) for part in parts[start : start + ROW_GROUP]]
            writer.write_table(pyarrow.Table.from_batches(chunks, schema))


def _batch(pyarrow: Any, schema: Any, columns: Columns) -> Any:
    vectors = columns.pop("embedding")
    arrays = {name: pyarrow.array(values) for name, values in columns.items()}
    flat = pyarrow.array(vectors.ravel())
    arrays["embedding"] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pyarrow.record_batch([arrays[name] for name in COLUMNS], schema=schema)
