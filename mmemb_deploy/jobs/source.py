"""A source of inputs, gone through once before a job begins, and read again as a stream while it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
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
class Source:
    """Where rows come from, how many, and what they were when they were counted; they themselves stay where they are.

    Of every chunk of `chunk` rows `places` says where it begins: at a thing of the source, after so many of its rows.
    """

    path: Path
    division: Division
    limits: Limits
    chunk: int
    rows: int
    places: tuple[tuple[Place, int], ...]
    fingerprint: str  # of all that the rows are
    names: str  # the fingerprint of their ids alone

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
        place, before = self.places[start // self.chunk]
        yield from islice(_records(self.path, self.division, self.limits, place), before, None)

    def inputs(self) -> Iterator[Any]:
        """Yield what `encode` reads. Raises InputError, at its row, where that cannot be read."""
        for row, record in enumerate(self.records()):
            if isinstance(content := record.content(self.limits), InputError):
                raise content.at(row)
            yield content

    def chunks(self, starts: list[int]) -> Iterator[tuple[int, int, Record]]:
        """Yield the rows of some chunks, in order: the chunk's first row, the row's place in it, the row.

        Raises OptionError where the source has become shorter since it was counted.
        """
        following, records = 0, self.records()
        for start in starts:
            if start != following:
                records = self.records(start)
            found = 0
            for place, record in enumerate(islice(records, self.size(start))):
                yield start, place, record
                found = place + 1
            if found != self.size(start):
                raise OptionError(
                    f"{self.path} has fewer rows than when this job began: let it be until the job is done"
                )
            following = start + found


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
    listing, names = hashlib.sha256(), hashlib.sha256()
    places: list[tuple[Place, int]] = []
    rows = 0
    for place, before, record in _placed(path, division, limits, None):
        if record.failure is not None and not keep_going:
            raise record.failure.at(rows)
        if rows % chunk == 0:
            places.append((place, before))
        facts = [record.id, record.file, record.input, record.page, record.second]
        listing.update(json.dumps(facts, default=_fact).encode())
        names.update(record.id.encode("utf-8", "surrogatepass") + b"\0")
        rows += 1
        if rows % chunk == 0:
            seen(chunk)
    seen(rows % chunk)
    if not rows:
        raise OptionError(
            f"{path} holds no inputs: expected lines of JSON, rows of CSV or parquet, or a folder with images, texts "
            "(.txt, .md), documents or videos"
        )
    return Source(path, division, limits, chunk, rows, tuple(places), listing.hexdigest(), names.hexdigest())


def _records(path: Path, division: Division, limits: Limits, place: Place) -> Iterator[Record]:
    return (record for _, _, record in _placed(path, division, limits, place))


def _placed(path: Path, division: Division, limits: Limits, start: Place) -> Iterator[tuple[Place, int, Record]]:
    """Yield rows, each with the place of what it belongs to, and its own number in that."""
    for place, whole in reader_of(path)(path, start):
        for before, record in enumerate(division.records(whole, limits)):
            yield place, before, record


def _fact(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
