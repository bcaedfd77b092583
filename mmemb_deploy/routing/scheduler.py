"""Who runs next: prompts, or a step of the rationales that are being written. `encode` and the server both ask it.

Three queues: prompts to be prefilled; prefilled rows that are to reason, whose KV caches are held; rows that are being
decoded. Between any two runs of the engine rows join and leave. After its prompt every row has a valid embedding, so
reasoning is an upgrade that can be taken back: where a deadline nears, where there is more to do than can be done.

It knows no threads, no network and no time but the clock that it is given. Iteration by iteration as Orca, prompts that
do not stall decoding as Sarathi-Serve (2403.02310), predicted by measured costs as Clockwork (2006.02464).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain, count
from logging import getLogger
from typing import Protocol

from mmemb_deploy.backends.protocol import Cache
from mmemb_deploy.errors import BackendError, DeadlineError, MmembError, OverloadError
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_deploy.routing.costs import Costs
from mmemb_deploy.routing.generation import CallersWriter, Writing
from mmemb_deploy.routing.items import Item, RationaleWriter
from mmemb_deploy.routing.load import LoadGate, Work
from mmemb_deploy.routing.paths import Paths
from mmemb_deploy.routing.router import Policy, highest

LOGGER = getLogger("mmemb_deploy")

PATIENCE = 10.0  # seconds after which a row without a deadline is due; and those that a step in priority is worth
PROMPTS = 0.6  # share of the time that prompts get while both wait
STALL = 0.025  # seconds that decoding goes on at most while prompts wait
GATHER = 4  # steps after which rows join, however few
ALIKE = 2  # times the shortest prompt of a batch that the longest may have, where somebody waits
MARGIN = 1.5  # runs; a row whose deadline is nearer than that settles


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What may wait to be prefilled; a call that exceeds one is refused whole."""

    rows: float = math.inf
    tokens: float = math.inf
    media_bytes: float = math.inf  # of decoded pixels


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How rows are run together.

    `patient` fills every batch before it decodes, for the most rows a second: nobody waits for a single one. Without
    it, a batch that fails is run again row by row, so that only the row at fault fails.
    """

    prompts: int = 32  # most rows of a prefill
    rationales: int = 32  # most rows that are decoded together
    patient: bool = True
    bounds: Bounds = Bounds()


@dataclass(eq=False)
class Call:
    """What jobs that came together share: a quota, None or how many of them reason, those of the highest scores."""

    quota: int | None = None
    scoring: int = 0  # jobs whose score is to be known first

    def chooses(self, job: Job) -> bool:
        """Return whether a job's score alone does not decide."""
        return self.quota is not None and job.item.given is None


@dataclass(eq=False)
class Job:
    """An item on its way, and what its caller asked for."""

    item: Item
    policy: Policy
    max_tokens: int  # of its rationale
    call: Call
    priority: int = 0  # the lowest first; it ages, so that nobody starves
    deadline: float = math.inf  # by the scheduler's clock
    yields: bool = False  # whether load may take its reasoning away
    exact: bool = False  # whether it would rather fail than do without the reasoning it is due
    ended: Callable[[Job], None] = lambda _: None  # hears once that there is a result, or an error
    scored: Callable[[Job], None] = lambda _: None  # hears that its prompt has run
    wrote: Callable[[Job], None] | None = None  # hears of every token of its rationale
    error: MmembError | None = None
    cancelled: bool = False
    alone: bool = False  # since a batch that it was in has failed
    arrived: float = 0.0
    cache: Cache | None = None
    writing: Writing | None = None
    began: float = 0.0  # to be decoded

    @property
    def keeps(self) -> bool:
        """Whether its cache may be needed."""
        return self.policy.reasoning != "never" or self.item.given is not None

    @property
    def due(self) -> float:
        """When it should have begun; the scheduler takes the earliest."""
        return min(self.deadline, self.arrived + PATIENCE) + PATIENCE * self.priority

    @property
    def after(self) -> int:
        """Tokens that may follow its prompt."""
        if not self.keeps:
            return 0
        return PATH_MARKERS + max(self.max_tokens, len(self.item.given or ()))

    @property
    def media_bytes(self) -> int:
        """Bytes of its pixels."""
        return sum(visual.pixels_THWC.nbytes for visual in self.item.row.visuals)


class Scheduler:
    """Runs jobs to their end, a run of the engine at a time: `submit` them, then `advance` while it returns True.

    Of one thread at a time, but for `cancel`.
    """

    def __init__(self, paths: Paths, pace: Pace, clock: Callable[[], float], *, load: LoadGate | None = None) -> None:
        """`clock` returns seconds; `load` raises the threshold of jobs that yield."""
        self.costs = Costs()
        self.seconds = {"prefill": 0.0, "decode": 0.0}  # that runs took
        self.load = load
        self.most = min(pace.rationales, paths.generator.most_rows)
        self._paths, self._pace, self._clock = paths, pace, clock
        self._writer: RationaleWriter | None = paths.writer
        self._caller = CallersWriter(paths.generator)
        self._prompts = Prompts()
        self._held: dict[
            Call, set[Job]
        ] = {}  # the best so far of calls with a quota, not all of whose scores are known
        self._ready: list[Job] = []  # to be decoded, the first due first
        self._elsewhere: list[Job] = []  # whose rationales another writes
        self._decoding = paths.generator.decoding()
        self._live: dict[Writing, Job] = {}
        self._owed = 0.0  # seconds of decoding before prompts run again
        self._since_join = 0
        self._cancelled = False

    @property
    def waiting(self) -> int:
        """Rows whose prompts have not run."""
        return len(self._prompts)

    @property
    def reasoning(self) -> int:
        """Rows that hold a cache and wait, or are being decoded."""
        return len(self._ready) + len(self._elsewhere) + len(self._live)

    @property
    def decoded(self) -> int:
        """Rows that are being decoded."""
        return len(self._live)

    @property
    def cache_tokens(self) -> int:
        """Tokens for which the KV cache has room held."""
        return sum(job.item.row.length + job.after for job in self._holding())

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take in the jobs of a call. Raises OverloadError where they do not fit, and takes none."""
        now = self._clock()
        self._admit(jobs, now)
        for job in jobs:
            job.arrived = now
            job.call.scoring += job.call.chooses(job)
            self._prompts.add(job)
        if self.load is not None:
            may = sum(job.yields for job in jobs)
            self.load.arrived(now, Work(len(jobs), sum(job.keeps for job in jobs) - may, may))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Let go of jobs that nobody waits for, before the next run; any thread may call this."""
        for job in jobs:
            job.cancelled = True
        self._cancelled = True

    def abandon(self, error: MmembError) -> None:
        """End all jobs with an error."""
        for job in [*self._prompts, *self._holding()]:
            self._end(job, error)

    def advance(self) -> bool:
        """Run the engine once; return False where there is nothing to run.

        Raises BackendError where the engine fails and the pace is patient.
        """
        now = self._clock()
        self._drop()
        self._settle(now)
        if self._prefills(now):
            self._prefill()
        elif self._elsewhere:
            self._write()
        elif self._ready or self._live:
            self._step()
        else:
            return False
        return True

    def _admit(self, jobs: Sequence[Job], now: float) -> None:
        bounds, queue = self._pace.bounds, self._prompts
        for reason, held, more, most in (
            ("rows", len(queue), len(jobs), bounds.rows),
            ("tokens", queue.tokens, sum(job.item.row.length for job in jobs), bounds.tokens),
            ("media bytes", queue.media_bytes, sum(job.media_bytes for job in jobs), bounds.media_bytes),
        ):
            if held + more > most:
                raise OverloadError(
                    f"{held} {reason} wait and {more} more came, above the limit of {most}: ask again later"
                    + ("" if held else ", in smaller parts"),
                    reason=reason,
                    retry_after=self._backlog_seconds(),
                )
        wait = self._backlog_seconds()
        earliest = min((job.deadline for job in jobs), default=math.inf)
        if now + wait + self.costs.prompts.run(1) > earliest and self.costs.token.seen:
            raise OverloadError(
                f"{wait:.3f} s of prompts wait before it, and its deadline is in {earliest - now:.3f} s: allow more, "
                "or ask again later",
                reason="deadline",
                retry_after=wait,
            )

    def _backlog_seconds(self) -> float:
        return self._prompts.tokens * self.costs.token.value

    def _holding(self) -> Iterator[Job]:
        yield from chain.from_iterable(self._held.values())
        yield from self._ready
        yield from self._elsewhere
        yield from self._live.values()

    def _drop(self) -> None:
        """Let go of what nobody waits for any more."""
        if self._cancelled:
            self._cancelled = False
            for job in [*self._prompts, *self._holding()]:
                if job.cancelled:
                    self._end(job)

    def _settle(self, now: float) -> None:
        """Answer with what there is where a deadline nears, or where load takes reasoning away."""
        for job in self._prompts.late(now):
            self._end(job, DeadlineError(f"its deadline passed {now - job.deadline:.3f} s ago, before its prompt ran"))
        step, waiting = self.costs.steps.run(len(self._live) or 1), min(self.waiting, self._pace.prompts)
        run = max(step, self.costs.prompts.run(waiting)) if waiting else step  # the longest that may be next
        busy = self._live or waiting  # else it costs nobody anything to try, and shows what a step takes now
        whole = step * self.costs.length.value if busy else 0
        for jobs, remaining in ((self._ready, max(whole, MARGIN * run)), (list(self._live.values()), MARGIN * run)):
            for job in [job for job in jobs if now + remaining > job.deadline]:
                self._degrade(job, "deadline")
        if self.load is None:
            return
        backlog = Work(len(self._prompts), len(self._ready))
        self.load.update(now, backlog, self.costs.prompts.row(self._pace.prompts), self.costs.rationale(self.most))
        for job in [job for job in self._ready if job.yields and job.item.score < self.load.threshold]:
            job.item.threshold = self.load.threshold
            self._degrade(job, "load")

    def _degrade(self, job: Job, reason: str) -> None:
        """Answer a job that was to reason with its direct embedding, if it may be."""
        if job.exact:
            self._end(job, DeadlineError(f"{reason} leaves no time to reason: allow more, or let it do without"))
        else:
            job.item.degraded_by = reason
            self._end(job)

    def _prefills(self, now: float) -> bool:
        """Return whether prompts are next."""
        first = self._prompts.first()
        if first is None:
            return False
        if not self.reasoning:
            return True
        most_bytes, token_bytes = self._paths.limits.cache_bytes, self._paths.token_bytes
        if first.keeps and token_bytes * (self.cache_tokens + first.item.row.length + first.after) > most_bytes:
            return False
        if self._pace.patient:
            return self.reasoning < self.most
        if first.keeps and len(self._ready) + len(self._elsewhere) >= self.most:
            return False
        return (
            self._owed <= 0 or now + self.costs.prompts.run(1) + self.costs.steps.run(len(self._live)) > first.deadline
        )

    def _prefill(self) -> None:
        jobs = self._prompts.batch(self._fits, alike=math.inf if self._pace.patient else ALIKE)
        rows = [job.item.row for job in jobs]
        began = self._clock()
        try:
            result = self._paths.fast_path.run(rows, keep=jobs[0].keeps)
        except BackendError as error:
            self._prompts.remove(*jobs)
            self._failed(jobs, error)
            return
        self._prompts.remove(*jobs)
        seconds = self._clock() - began
        self.costs.prefilled(len(rows), len(rows) * max(row.length for row in rows), seconds)
        self.seconds["prefill"] += seconds
        self._owed = max(min(seconds * (1 - PROMPTS) / PROMPTS, STALL), 1e-9)
        for place, job in enumerate(jobs):
            item = job.item
            item.embedding_D, item.score = result.embeddings_BD[place], float(result.scores_B[place])
            item.queued, item.fast_path = began - job.arrived, seconds
            if result.cache is not None and (job.call.chooses(job) or self._reasons(job)):
                job.cache = result.cache.take([place])
            job.scored(job)
        for call in {job.call for job in jobs}:
            self._choose(call, {job for job in jobs if job.call is call and call.chooses(job)})
        for job in jobs:
            if job.call.chooses(job):
                continue
            if job.cache is None:
                self._end(job)
            else:
                self._reason(job)

    def _fits(self, jobs: int, tokens: int, *, keeps: bool) -> bool:
        within = jobs <= self._pace.prompts and jobs * tokens <= self._paths.limits.tokens
        return within and self._paths.fast_path.fits(jobs, tokens, after=0 if keeps else None)

    def _reasons(self, job: Job) -> bool:
        """Return whether a job reasons by its score."""
        item, policy = job.item, job.policy
        if item.given is not None or policy.reasoning != "auto":
            return job.keeps
        item.threshold = policy.threshold
        if self.load is not None and job.yields:
            self.load.scored(item.score)
            item.threshold = max(policy.threshold, self.load.threshold)
        reasons = item.score >= item.threshold
        if policy.wants(item.score) and not reasons:
            item.degraded_by = "load"
        return reasons

    def _choose(self, call: Call, scored: set[Job]) -> None:
        """Hold the best of a call with a quota, who reason once all scores are known, and end the others."""
        if call.quota is None:
            return
        call.scoring -= len(scored)
        found = self._held.pop(call, set()) | scored
        best = set(highest(((job.item.index, job.item.score) for job in found), call.quota))
        chosen = sorted((job for job in found if job.item.index in best), key=lambda job: job.item.index)
        if call.scoring:
            self._held[call] = set(chosen)
        for job in sorted(found.difference(chosen), key=lambda job: job.item.index):
            self._end(job)
        if not call.scoring:
            for job in chosen:
                self._reason(job)

    def _reason(self, job: Job) -> None:
        if job.item.given is not None or self._writer is not None:
            self._elsewhere.append(job)
        else:
            insort(self._ready, job, key=lambda each: each.due)

    def _write(self) -> None:
        """Let another than the bundle's own generator write rationales, the caller first."""
        given = [job for job in self._elsewhere if job.item.given is not None]
        jobs, writer = (given, self._caller) if given else (self._elsewhere, self._writer)
        jobs = jobs[: self.most]
        assert writer is not None
        began = self._clock()
        caches = [job.cache for job in jobs if job.cache is not None]
        try:
            written = writer.write([job.item for job in jobs], caches, jobs[0].max_tokens)
        except BackendError as error:
            self._elsewhere = [job for job in self._elsewhere if job not in jobs]
            self._failed(jobs, error)
            return
        self._elsewhere = [job for job in self._elsewhere if job not in jobs]
        seconds = self._clock() - began
        self._owed -= seconds
        for job, one in zip(jobs, written, strict=True):
            job.item.generation = seconds
            if isinstance(one, str):
                job.item.fallback = one
            else:
                job.item.end(one, writer.name)
            self._end(job)

    def _step(self) -> None:
        """Write a token of every rationale that is being written."""
        began = self._clock()
        self._join()
        rows = len(self._live)
        try:
            ended = self._decoding.step()
        except BackendError as error:
            jobs = list(self._live.values())
            self._decoding.leave(self._live)
            self._live = {}
            self._failed(jobs, error)
            return
        now = self._clock()
        self.costs.steps.add(rows, now - began)
        self.seconds["decode"] += now - began
        self._owed -= now - began
        self._since_join += 1
        for job in self._live.values():
            if job.wrote is not None:
                job.wrote(job)
        for writing in ended:
            job = self._live.pop(writing)
            self.costs.length.add(len(writing.token_ids) + PATH_MARKERS)
            job.item.generation = now - job.began
            job.item.end(writing.reasoned, "bundle")
            self._end(job)

    def _join(self) -> None:
        """Let rows that are ready join those that are decoded: several at once, since each time costs something."""
        free = self.most - len(self._live)
        joining = self._ready[:free]
        if alone := [job for job in (*self._live.values(), *self._ready) if job.alone]:
            joining = [] if self._live else alone[:1]
        few = len(joining) < min(free, self.most // 4) and self._since_join < GATHER
        if not joining or (self._live and few):
            return
        caches = [job.cache for job in joining if job.cache is not None]
        written = self._decoding.join(caches, [job.max_tokens for job in joining])
        self._ready = [job for job in self._ready if job not in joining]
        self._live |= dict(zip(written, joining, strict=True))
        self._since_join, now = 0, self._clock()
        for writing, job in zip(written, joining, strict=True):
            job.item.held = now - job.arrived - job.item.queued - job.item.fast_path
            job.writing, job.began = writing, now

    def _failed(self, jobs: Sequence[Job], error: BackendError) -> None:
        """Run jobs again one by one, or end the one that failed alone."""
        if self._pace.patient:
            raise error
        LOGGER.warning("a run of %d rows failed: %s", len(jobs), error)
        error = error.with_traceback(None)  # whose frames hold caches
        for job in jobs:
            job.alone, job.writing = True, None
            if len(jobs) == 1:
                self._end(job, error)
            elif job.cache is None:
                self._prompts.add(job)
            else:
                self._reason(job)

    def _end(self, job: Job, error: MmembError | None = None) -> None:
        """Let go of a job wherever it is, and tell its caller."""
        call = job.call
        if job in self._prompts:
            self._prompts.remove(job)
        elif job.writing in self._live:
            self._decoding.leave([job.writing])
            del self._live[job.writing]
        for queue in (self._ready, self._elsewhere):
            if job in queue:
                queue.remove(job)
        if call in self._held:
            self._held[call].discard(job)
        if error is None and (late := self._clock() - job.deadline) > 0:
            error = DeadlineError(f"it was done {late:.3f} s after its deadline: allow more, or ask again later")
        job.cache, job.writing, job.error = None, None, error
        if job.item.embedding_D is None and call.chooses(job):
            call.scoring -= 1
            self._choose(call, set())
        job.ended(job)


Key = tuple[bool, bool, int, tuple[tuple[int, int], ...], int]


class Fits(Protocol):
    """Whether so many prompts of so many tokens run together."""

    def __call__(self, jobs: int, tokens: int, *, keeps: bool) -> bool: ...


class Prompts:
    """Jobs whose prompts have not run: by when they are due, and by what can run together."""

    def __init__(self) -> None:
        self.tokens = self.media_bytes = 0
        self._due: list[tuple[float, Key, Job]] = []  # a heap, in which those that have left remain for a while
        self._alike: list[tuple[Key, Job]] = []  # sorted
        self._keys: dict[Job, Key] = {}
        self._numbers = count()
        self._dated = 0  # jobs with a deadline

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._keys))

    def __contains__(self, job: Job) -> bool:
        return job in self._keys

    def add(self, job: Job) -> None:
        """Take in a job."""
        row = job.item.row
        key = (job.alone, job.keeps, row.length, tuple(visual.grid for visual in row.visuals), next(self._numbers))
        self._keys[job] = key
        insort(self._alike, (key, job))
        heappush(self._due, (job.due, key, job))
        self._count(job, 1)

    def remove(self, *jobs: Job) -> None:
        """Let jobs go."""
        for job in jobs:
            key = self._keys.pop(job)
            del self._alike[bisect_left(self._alike, (key,))]
            self._count(job, -1)

    def _count(self, job: Job, sign: int) -> None:
        self.tokens += sign * job.item.row.length
        self.media_bytes += sign * job.media_bytes
        self._dated += sign * (job.deadline < math.inf)

    def first(self) -> Job | None:
        """Return the job that is due first."""
        while self._due and self._keys.get(self._due[0][2]) != self._due[0][1]:
            heappop(self._due)
        return self._due[0][2] if self._due else None

    def late(self, now: float) -> list[Job]:
        """Return the jobs whose deadline has passed."""
        return [job for job in self._keys if job.deadline < now] if self._dated else []

    def batch(self, fits: Fits, *, alike: float) -> list[Job]:
        """Return the job that is due first, and others whose prompts are at most `alike` times as long or short."""
        first = self.first()
        assert first is not None
        key = self._keys[first]
        place = bisect_left(self._alike, (key,))
        jobs, keeps, length = [first], first.keeps, first.item.row.length
        longest = length
        if not first.alone:
            after = range(place + 1, len(self._alike))
            before = range(place - 1, -1, -1)
            for where in (after, before):
                for index in where:
                    other_key, job = self._alike[index]
                    tokens = max(longest, job.item.row.length)
                    near = max(length, job.item.row.length) <= alike * min(length, job.item.row.length)
                    if other_key[:2] != key[:2] or not near or not fits(len(jobs) + 1, tokens, keeps=keeps):
                        break
                    jobs.append(job)
                    longest = tokens
        return jobs
