"""Annotation files as hub data sets hold them: which files are a split of a configuration, and their rows.

The rule is that of the hub's own loader where a data set configures none: files and folders name configuration and
split as words ("test_1k/test-00000-of-00001.parquet", "msvd_test.json", "data/test.jsonl"), and where none names a
split, all files are the one that was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmemb_benchmarks.mmeb_v2.tasks import Task
from mmemb_deploy.errors import InputError, MissingExtraError, OptionError

SUFFIXES = (".parquet", ".jsonl", ".json")  # the first kind that is there; the same rows may lie there in several
SPLITS = ("train", "test", "val", "validation", "dev")
NO_ROWS = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")  # of the hub's loader itself
BATCH = 64  # rows of a parquet file that are held at a time


def rows_of(task: Task, folder: Path, *columns: str, subset: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a task, or of a `subset` in place of the task's own, with the columns asked for.

    Raises OptionError, with what the folder holds, where there is no file of the task's split; InputError that names
    the file for a missing column or a malformed line.
    """
    for path in _files(folder, subset or task.subset, task.split):
        yield from (_parquet_rows if path.suffix == ".parquet" else _json_rows)(path, columns)


def _files(folder: Path, subset: str | None, split: str) -> list[Path]:
    """Return the files of one split, in order."""
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder: put the annotations there, or pass --hub to download them")
    found = sorted(
        path.relative_to(folder)
        for suffix in SUFFIXES
        for path in folder.rglob(f"*{suffix}")
        if path.name not in NO_ROWS and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    chosen = [path for path in found if subset is None or _names(path, subset)]
    if any(_names(path, name) for path in chosen for name in SPLITS):
        chosen = [path for path in chosen if _names(path, split)]
    for suffix in SUFFIXES:
        if files := [folder / path for path in chosen if path.suffix == suffix]:
            return files
    wanted = f"split {split!r}" + (f" of {subset!r}" if subset else "")
    held = ", ".join(map(str, found[:8])) or "no parquet, jsonl or json file"
    raise OptionError(f"{folder} holds no file of {wanted}; it holds {held}")


def _names(path: Path, word: str) -> bool:
    """Whether a path names a word, not inside another one."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", path.as_posix()) is not None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    file = parquet.ParquetFile(path)
    _check_columns(path, file.schema_arrow.names, columns)
    for batch in file.iter_batches(batch_size=BATCH, columns=list(columns)):
        yield from batch.to_pylist()


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    # JSON text may hold line separators that are no newlines, at which `splitlines` would cut it.
    pieces = [text] if path.suffix == ".json" else text.split("\n")
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            continue
        try:
            read = json.loads(piece)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, from line {number} on, is not JSON: {error}") from error
        for row in read if isinstance(read, list) else [read]:
            _check_columns(path, row, columns)
            yield {column: row[column] for column in columns}


def _check_columns(path: Path, held: Sequence[str] | dict[str, Any], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in held:
            raise InputError(f"{path} has no column {column!r}; it has {', '.join(held)}")
