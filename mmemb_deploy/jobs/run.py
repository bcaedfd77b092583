"""Doing a job with one embedder: threads prepare rows while the engine runs those that are ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import InputError
from mmemb_deploy.jobs.ahead import Ahead
from mmemb_deploy.jobs.job import Job, Summary
from mmemb_deploy.jobs.parts import write_part
from mmemb_deploy.jobs.records import Record
from mmemb_deploy.machine import cores
from mmemb_deploy.options import Options
from mmemb_deploy.preparer import Prepared
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.routing import jobs as routing

PIXEL_BYTES = 128 * 2**20  # of prepared rows that wait for a thread to take them, and as many for the engine
MOST_THREADS = 8  # by default
TEXTS = 16  # that are prepared together


@dataclass(frozen=True)
class Piece:
    """Rows of a chunk that are prepared and handed to the engine together."""

    chunk: int  # its first row
    place: int  # of the first of these rows in it
    records: Sequence[Record]


def embed_source(
    embedder: Embedder, job: Job, done: Callable[[int], None], *, prepare_threads: int | None = None
) -> Summary:
    """Do a job; `done` hears how many more rows are finished.

    `prepare_threads` read, decode, resize and tokenise while the engine runs; by default one for each core, at most
    MOST_THREADS. Raises InputError, at the row of the source, unless the job keeps going; OptionError as `Job.begin`.
    """
    source = job.source
    missing = job.begin(embedder.manifest, embedder.reasoner)
    done(source.rows - sum(map(source.size, missing)))
    with Ahead(
        partial(_prepare_piece, embedder, job),
        _pieces(embedder, job, missing),
        threads=prepare_threads or min(cores(), MOST_THREADS),
        most=source.chunk if alone(embedder, job) else 1,
        weigh=_pixel_bytes,
        most_weight=PIXEL_BYTES,
    ) as ahead:
        _Run(embedder, job, done).through(ahead)
    return job.end(embedder.manifest)


def prepare(embedder: Embedder, job: Job, records: Sequence[Record], first: int) -> Prepared:
    """Prepare rows of a job, the first of which has this number. Raises InputError at the row of the source."""
    options = embedder.document_options | job.options if job.document else job.options
    inputs = [record.content(job.source.limits) for record in records]
    try:
        return embedder.prepare(inputs, errors="return" if job.keep_going else "raise", **options)
    except InputError as error:
        raise error.at(first + (error.index or 0)) from error


def alone(embedder: Embedder, job: Job) -> bool:
    """Whether a row can be embedded by itself: not where a share of a chunk reasons, nor where a call is sent."""
    return job.options.get("reasoning_rate") is None and embedder.reasoner is None


def _pieces(embedder: Embedder, job: Job, missing: list[int]) -> Iterator[Piece]:
    """Yield a chunk whole, or what takes long to prepare alone, and texts by the dozen."""
    one_by_one = alone(embedder, job)
    for start, rows in groupby(job.source.chunks(missing), itemgetter(0)):
        piece: list[Record] = []
        place = 0
        for _, place, record in rows:
            piece.append(record)
            if one_by_one and (len(piece) == TEXTS or not record.is_text):
                yield Piece(start, place + 1 - len(piece), piece)
                piece = []
        if piece:
            yield Piece(start, place + 1 - len(piece), piece)


def _prepare_piece(embedder: Embedder, job: Job, piece: Piece) -> Prepared:
    return prepare(embedder, job, piece.records, piece.chunk + piece.place)


def _pixel_bytes(prepared: Prepared) -> int:
    return sum(visual.pixels_THWC.nbytes for item in prepared.items for visual in item.row.visuals)


@dataclass
class _Chunk:
    """A chunk that has begun: its rows, what runs for it, and what has come of it, by place."""

    records: list[Record] = field(default_factory=list)
    jobs: dict[int, list[routing.Job]] = field(default_factory=dict)
    results: dict[int, EncodeResult] = field(default_factory=dict)
    finished: int = 0  # rows


class _Run:
    """One scheduler over all rows of a job, which writes a chunk when the last of its rows has ended."""

    def __init__(self, embedder: Embedder, job: Job, done: Callable[[int], None]) -> None:
        self._embedder, self._job, self._done = embedder, job, done
        options = Options.of(dict(job.options))
        self._scheduler = embedder.scheduler(options)
        self._batch_size = options.batch_size
        self._alone = alone(embedder, job)
        self._gathered: list[tuple[Piece, Prepared]] = []  # for a batch: a run of few rows takes as long as one of many
        self._chunks: dict[int, _Chunk] = {}
        self._bytes = 0  # of pixels that wait for the engine

    def through(self, ahead: Ahead[Piece, Prepared]) -> None:
        """Run all that comes. Where a row cannot be prepared, chunks before its own are finished first."""
        try:
            idle = True
            while True:
                if idle or self._has_room():
                    made = ahead.take(wait=idle)
                    if made is not None:
                        idle = not self._gather(*made) and idle
                        continue
                if idle or ahead.ended:
                    if idle and not self._gathered:
                        return
                    self._submit()
                idle = not self._scheduler.advance()
        except InputError as error:
            self._submit()
            broken = (error.index or 0) // self._job.source.chunk * self._job.source.chunk
            if broken in self._chunks:
                self._scheduler.cancel([job for jobs in self._chunks[broken].jobs.values() for job in jobs])
            while self._scheduler.advance():
                pass
            raise

    def _has_room(self) -> bool:
        """Return whether more rows may come to those that wait; enough of them let the scheduler pair like lengths."""
        return self._alone and self._scheduler.waiting < self._job.source.chunk and self._bytes <= PIXEL_BYTES

    def _gather(self, piece: Piece, prepared: Prepared) -> bool:
        """Keep rows until they are a batch; return whether they went to the scheduler."""
        self._gathered.append((piece, prepared))
        self._bytes += _pixel_bytes(prepared)
        rows = sum(made.inputs for _, made in self._gathered)
        if self._alone and rows < self._batch_size and self._bytes <= PIXEL_BYTES:
            return False
        self._submit()
        return True

    def _submit(self) -> None:
        """Hand what was gathered to the scheduler."""
        gathered, self._gathered = self._gathered, []
        for piece, prepared in gathered:
            chunk = self._chunks.setdefault(piece.chunk, _Chunk())
            chunk.records += piece.records
            chunk.jobs[piece.place] = jobs = self._embedder.jobs(prepared)
            self._watch(piece, prepared, jobs)
            self._scheduler.submit(jobs)
            if not jobs:
                self._finish(piece, prepared)

    def _watch(self, piece: Piece, prepared: Prepared, jobs: Sequence[routing.Job]) -> None:
        left = len(jobs)

        def scored(job: routing.Job) -> None:
            self._bytes -= job.media_bytes

        def ended(job: routing.Job) -> None:
            nonlocal left
            left -= 1
            if not (left or job.cancelled):
                self._finish(piece, prepared)

        for job in jobs:
            job.scored, job.ended = scored, ended

    def _finish(self, piece: Piece, prepared: Prepared) -> None:
        chunk = self._chunks[piece.chunk]
        del chunk.jobs[piece.place]  # and with them their pixels
        chunk.results[piece.place] = self._embedder.result(prepared)
        chunk.finished += prepared.inputs
        if chunk.finished == self._job.source.size(piece.chunk):
            results = [chunk.results[place] for place in sorted(chunk.results)]
            write_part(self._job.part(piece.chunk), chunk.records, results)
            del self._chunks[piece.chunk]
        self._done(prepared.inputs)
