"""A source of inputs, gone through once before a job begins, and read again as a stream while it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import InputError, OptionError
from mmemb_deploy.inputs.limits import DEFAULTS, Limits
from mmemb_deploy.jobs.readers import Place, reader_of
from mmemb_deploy.jobs.records import UNDIVIDED, Division, Record

CHUNK = 256  # rows; the unit of work that is kept


@dataclass(frozen=True)
class Mark:
    """Where a chunk begins: at a thing of the source, after so many of its rows; and a fingerprint of its rows' ids."""

    place: Place
    before: int
    names: bytes


@dataclass(frozen=True)
class Source:
    """Where rows come from, how many, and what they were when they were counted; they themselves stay where they are.

    `marks` are those of every chunk of `chunk` rows.
    """

    path: Path
    division: Division
    limits: Limits
    chunk: int
    rows: int
    marks: tuple[Mark, ...]
    fingerprint: str  # of all that the rows are

    @property
    def starts(self) -> range:
        """The first row of every chunk."""
        return range(0, self.rows, self.chunk)

    def size(self, start: int) -> int:
        """Return the rows of the chunk that begins with this one."""
        return min(self.chunk, self.rows - start)

    def absolute(self) -> Source:
        """Return the source by a path that holds anywhere."""
        return replace(self, path=self.path.absolute())

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yield the rows from the first of a chunk on."""
        mark = self.marks[start // self.chunk]
        placed = _placed(self.path, self.division, self.limits, mark.place)
        yield from islice((record for _, _, record in placed), mark.before, None)

    def inputs(self) -> Iterator[Any]:
        """Yield what `encode` reads. Raises InputError, at its row, where that cannot be read."""
        for row, record in enumerate(self.records()):
            if isinstance(content := record.content(self.limits), InputError):
                raise content.at(row)
            yield content

    def chunks(self, starts: list[int]) -> Iterator[tuple[int, int, Record]]:
        """Yield the rows of some chunks, in order: the chunk's first row, the row's place in it, the row.

        Raises OptionError, before a chunk is complete, where its rows are no longer those that were counted.
        """
        following, records = 0, self.records()
        for start in starts:
            if start != following:
                records = self.records(start)
            names: list[str] = []
            for record in islice(records, self.size(start)):
                names.append(record.id)
                if len(names) == self.size(start):
                    self._check(start, names)
                yield start, len(names) - 1, record
            if len(names) < self.size(start):
                self._check(start, names)
            following = start + len(names)

    def _check(self, start: int, names: Sequence[str]) -> None:
        if fingerprint_of(names) != self.marks[start // self.chunk].names:
            raise OptionError(
                f"{self.path} changed since this job began, in the {self.chunk} rows from {start} on: make it what it "
                "was and run this again, or begin anew with another output"
            )


def read_source(
    path: Path,
    *,
    division: Division = UNDIVIDED,
    limits: Limits = DEFAULTS,
    keep_going: bool = True,
    chunk: int = CHUNK,
    seen: Callable[[int], None] = lambda _: None,
) -> Source:
    """Go through a source: JSON lines, CSV, parquet, a folder, or one image, document or video.

    `limits` bound the documents and videos that are opened to be counted; one that cannot be is a row that fails, or
    an error unless `keep_going`. `seen` hears how many more were read. Paths inside a file are relative to it.
    Raises OptionError for a path that is none of those, a malformed line and a source without inputs; InputError, at
    its row, as said.
    """
    listing = hashlib.sha256()
    marks: list[Mark] = []
    begin: tuple[Place, int] = None, 0
    names: list[str] = []
    rows = 0
    for place, before, record in _placed(path, division, limits, None):
        if record.failure is not None and not keep_going:
            raise record.failure.at(rows)
        if not names:
            begin = place, before
        facts = [record.id, record.file, record.input, record.page, record.second]
        listing.update(json.dumps(facts, default=_fact).encode())
        names.append(record.id)
        rows += 1
        if len(names) == chunk:
            marks.append(Mark(*begin, fingerprint_of(names)))
            names = []
            seen(chunk)
    if names:
        marks.append(Mark(*begin, fingerprint_of(names)))
        seen(len(names))
    if not rows:
        raise OptionError(
            f"{path} holds no inputs: expected lines of JSON, rows of CSV or parquet, or a folder with images, texts "
            "(.txt, .md), documents or videos"
        )
    return Source(path, division, limits, chunk, rows, tuple(marks), listing.hexdigest())


def fingerprint_of(names: Sequence[str]) -> bytes:
    """Return a fingerprint of ids in their order."""
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).digest()


def _placed(path: Path, division: Division, limits: Limits, start: Place) -> Iterator[tuple[Place, int, Record]]:
    """Yield rows, each with the place of what it belongs to, and its own number in that."""
    for place, whole in reader_of(path)(path, start):
        for before, record in enumerate(division.records(whole, limits)):
            yield place, before, record


def _fact(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
