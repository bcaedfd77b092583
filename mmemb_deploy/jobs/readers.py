"""What a source holds, one thing after another: JSON lines, CSV, parquet, and the files of a folder.

Each reader yields a thing beside the place where it begins, from which another call can go on. None holds more of a
source than what it yields next, but for the names of one folder and the index of a parquet file.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import MissingExtraError, OptionError
from mmemb_deploy.inputs.formats import kind_of
from mmemb_deploy.inputs.parse import KEYS
from mmemb_deploy.jobs.records import Record

COLUMNS = ("id", *KEYS)
WORDS = ("id", "text", "image", "video", "document")  # cells of a CSV that are taken as they are; others are JSON
FILES = ("image", "images", "video", "document")  # parts that may name files
BATCH = 32  # rows of a parquet file that are read together; each may hold images

Place = Any  # what a reader goes on from; None is the beginning
Reader = Callable[[Path, Place], Iterator[tuple[Place, Record]]]


def reader_of(path: Path) -> Reader:
    """Return what reads a source. Raises OptionError where nothing is there."""
    if path.is_dir():
        return read_folder
    if not path.is_file():
        raise OptionError(f"{path} does not exist: pass a folder, or a file of JSON lines, CSV or parquet")
    if kind_of(path) in ("image", "document", "video"):
        return read_file
    return {".csv": read_csv, ".parquet": read_parquet}.get(path.suffix.lower(), read_lines)


def read_lines(path: Path, place: Place = None) -> Iterator[tuple[Place, Record]]:
    """Read JSON lines: each a string, or an object of an input's parts and an optional "id".

    Raises OptionError, naming the line, for one that is neither.
    """
    offset, number = place or (0, 1)
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if line.strip():
                yield (offset, number), _record(path, number, _object(path, number, line))
            offset, number = offset + len(line), number + 1


def _object(path: Path, number: int, line: bytes) -> str | dict[str, Any]:
    try:
        content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}, line {number} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise OptionError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(content, (str, dict)):
        raise OptionError(f"{path}, line {number} is a {type(content).__name__}: write a string or an object")
    return content


def read_csv(path: Path, place: Place = None) -> Iterator[tuple[Place, Record]]:
    """Read a CSV file whose columns are an input's parts, and an optional "id"; an empty cell is no part.

    A part that is a list or a number is written in JSON. Raises OptionError for a column that is no part and, naming
    the row, for one that is malformed.
    """
    csv.field_size_limit(sys.maxsize)  # `max_text_chars` bounds a text
    with path.open("rb") as file:
        at = 0

        def lines() -> Iterator[str]:
            nonlocal at
            for line in file:
                at += len(line)
                yield line.decode("utf-8")

        try:
            rows = csv.reader(lines(), strict=True)
            names = [name.removeprefix("\ufeff").strip() for name in next(rows, [])]
            _check_columns(path, names)
            offset, number = place or (at, 1)
            file.seek(offset)
            at = offset
            for row in rows:
                if row:
                    yield (offset, number), _record(path, number, _cells(path, number, names, row))
                    number += 1
                offset = at
        except (csv.Error, UnicodeDecodeError) as error:
            raise OptionError(f"{path} is not a CSV file in UTF-8, at byte {at}: {error}") from error


def _cells(path: Path, number: int, names: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(names):
        raise OptionError(f"{path}, row {number} has {len(row)} cells, and the first line names {len(names)} columns")
    parts: dict[str, Any] = {}
    for name, cell in zip(names, row, strict=True):
        try:
            if cell:
                parts[name] = cell if name in WORDS else json.loads(cell)
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, row {number}: {name} is {cell!r}, which is not JSON: {error}") from error
    return parts


def read_parquet(path: Path, place: Place = None) -> Iterator[tuple[Place, Record]]:
    """Read a parquet file whose columns are an input's parts, and an optional "id"; null is no part.

    An image may be a path, the bytes of a file, or a struct of both. Raises OptionError for a column that is no part
    and for what is no parquet file, MissingExtraError without pyarrow.
    """
    pyarrow, parquet = load_pyarrow()
    first, number = place or 0, 1
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            _check_columns(path, file.schema_arrow.names)
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= first:
                    number += rows
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group]):
                    for row in batch.to_pylist() if number + len(batch) > first else ():
                        if number >= first:
                            parts = {name: _plain(value) for name, value in row.items() if value is not None}
                            yield number, _record(path, number, parts)
                        number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise OptionError(f"{path} cannot be read as a parquet file: {error}") from error


def _plain(value: Any) -> Any:
    """Return an image or a list of them, where a data set keeps its bytes beside its path."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value


def read_folder(path: Path, place: Place = None) -> Iterator[tuple[Place, Record]]:
    """Read the files of a folder and those below it, by name: images, texts, documents and videos."""
    for parts in _walk(path, (), place or ()):
        file = path.joinpath(*parts)
        if (kind := kind_of(file)) is not None:
            yield parts, _file(file, kind, "/".join(parts))


def _walk(folder: Path, above: tuple[str, ...], place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    with os.scandir(folder) as found:
        entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
    for name, is_folder in entries:
        parts = (*above, name)
        if parts < place[: len(parts)]:
            continue
        if is_folder:
            yield from _walk(folder / name, parts, place)
        else:
            yield parts


def read_file(path: Path, _: Place = None) -> Iterator[tuple[Place, Record]]:
    """Read a source that is one image, document or video."""
    kind = kind_of(path)
    assert kind is not None
    yield None, _file(path, kind, path.name)


def _file(path: Path, kind: str, name: str) -> Record:
    absolute = path.absolute()
    return Record(name, name, absolute if kind == "text" else {kind: str(absolute)})


def _check_columns(path: Path, names: list[str]) -> None:
    unknown = [name for name in names if name not in COLUMNS]
    if unknown or not set(names) & set(KEYS):
        found = f"the column {unknown[0]!r}, which is no part of an input" if unknown else "no column with inputs"
        raise OptionError(f"{path} has {found}: rename it or leave it out; known are {', '.join(COLUMNS)}")


def _record(path: Path, number: int, content: str | dict[str, Any]) -> Record:
    if isinstance(content, str):
        return Record(str(number), "", content)
    name = content.pop("id", number)
    folder = path.parent.absolute()
    files = {str(each) for key in FILES for each in _listed(content.get(key)) if isinstance(each, str)}
    for key in FILES:
        if isinstance(value := content.get(key), list):
            content[key] = [_resolved(each, folder) for each in value]
        elif value is not None:
            content[key] = _resolved(value, folder)
    pages, second = content.get("pages"), content.get("start")
    return Record(
        str(name),
        _relative(files.pop(), folder) if len(files) == 1 else "",
        content,
        pages[0] if isinstance(pages, list) and len(pages) == 1 and isinstance(pages[0], int) else 0,
        float(second) if isinstance(second, int | float) else float("nan"),
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _resolved(value: Any, folder: Path) -> Any:
    """Return a path as one that holds anywhere; URLs are left to be refused."""
    return str(folder / value) if isinstance(value, str) and ":" not in value else value


def _relative(file: str, folder: Path) -> str:
    path = Path(file)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def load_pyarrow(extra: str = "parquet") -> tuple[Any, Any]:
    """Return pyarrow and pyarrow.parquet. Raises MissingExtraError without them, which names the extra."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", extra) from error
    return pyarrow, parquet
