"""The files of a published data set: found, or an error that says how to get them; read a little at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import MissingExtraError, OptionError

BATCH = 64  # rows of a parquet file that are held at a time; a row can hold a whole page image


def how_to_get(repository: str, folder: Path) -> str:
    """Return the command that downloads a data set of the Hugging Face hub."""
    return f"hf download {repository} --repo-type dataset --local-dir {folder}"


def data_files(folder: Path, pattern: str, fix: str) -> list[Path]:
    """Return a folder's files, by name. Raises OptionError, with the fix, where there is none."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise OptionError(f"{folder / pattern} is missing; get it with: {fix}")
    return found


def parquet_rows(
    files: Sequence[Path], columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet files, in order, with the columns asked for; an `optional` one that is absent is None.

    Raises OptionError that names a file without one of the columns, MissingExtraError without pyarrow.
    """
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "train") from error
    for path in files:
        with parquet.ParquetFile(path) as file:
            held = file.schema_arrow.names
            for column in columns:
                if column not in held:
                    raise OptionError(f"{path} has no column {column!r}; it has {', '.join(held)}")
            absent = {column: None for column in optional if column not in held}
            present = [*columns, *(column for column in optional if column in held)]
            for batch in file.iter_batches(batch_size=BATCH, columns=present):
                yield from (row | absent for row in batch.to_pylist())


def json_lines(path: Path, fix: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a file of JSON lines with their line numbers, from 1.

    Raises OptionError for a file that is missing, with the fix, and for a line that is not JSON.
    """
    if not path.is_file():
        raise OptionError(f"{path} is missing; get it with: {fix}")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise OptionError(f"{path}, line {number} is not JSON: {error}") from error
