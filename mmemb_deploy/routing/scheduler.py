"""Who runs next: prompts, or a step of the rationales that are being written. `encode` and the server both ask it.

Three queues: prompts to be prefilled; prefilled rows that are to reason, whose KV caches are held; rows that are being
decoded. Between any two runs of the engine rows join and leave. After its prompt every row has a valid embedding, so
reasoning is an upgrade that can be taken back: where a deadline nears, where there is more to do than can be done.
Where the paths have a lane, prompts run there while others, or steps, run here.

It knows no threads, no network and no time but the clock that it is given. Iteration by iteration as Orca, prompts that
do not stall decoding as Sarathi-Serve (2403.02310), predicted by measured costs as Clockwork (2006.02464).
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from logging import getLogger

from mmemb_deploy.errors import BackendError, DeadlineError, MmembError, OverloadError
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_deploy.routing.costs import Costs
from mmemb_deploy.routing.generation import CallersWriter, Writing
from mmemb_deploy.routing.items import RationaleWriter
from mmemb_deploy.routing.jobs import Call, Job, Pace
from mmemb_deploy.routing.lane import Beside, Ran
from mmemb_deploy.routing.load import OVERLAP, LoadGate, Work
from mmemb_deploy.routing.paths import Paths
from mmemb_deploy.routing.prompt_queue import PromptQueue
from mmemb_deploy.routing.router import highest

LOGGER = getLogger("mmemb_deploy")

PROMPTS = 0.6  # share of the time that prompts get while both wait,
BESIDE = 0.3  # or of the time here, where more of them run in a lane
STALL = 0.025  # seconds that decoding goes on at most while prompts wait, or GATHER steps, if they take longer
GATHER = 4  # steps after which rows join, however few
MARGIN = 1.5  # runs; a row whose deadline is nearer than that settles


class Scheduler:
    """Runs jobs to their end, a run of the engine at a time: `submit` them, then `advance` while it returns True.

    Of one thread at a time, but for `cancel`.
    """

    def __init__(self, paths: Paths, pace: Pace, clock: Callable[[], float], *, load: LoadGate | None = None) -> None:
        """`clock` returns seconds; `load` raises the threshold of jobs that yield."""
        self.costs = Costs()
        self.seconds = {"prefill": 0.0, "decode": 0.0}  # that runs took
        self._overlap = 0.0  # seconds in which two ran
        self._beside = Beside(paths.lane, clock)
        self.load = load
        self.most = min(pace.rationales, paths.generator.most_rows)
        self._paths, self._pace, self._clock = paths, pace, clock
        self._writer: RationaleWriter | None = paths.writer
        self._caller = CallersWriter(paths.generator)
        self._prompts = PromptQueue()
        self._held: dict[Call, set[Job]] = {}  # the best so far of calls with a quota, until all scores are known
        self._ready: list[Job] = []  # to be decoded, the first due first
        self._elsewhere: list[Job] = []  # whose rationales another writes
        self._decoding = paths.generator.decoding()
        self._live: dict[Writing, Job] = {}
        lane = paths.lane is not None
        self._overlaps = OVERLAP if lane else 1.0  # seconds of runs in one
        self._drains = 1 + BESIDE if lane else 1.0  # those of prompts, while rationales wait too
        self._share = BESIDE if lane else PROMPTS  # of the time here that prompts get then
        self._owed = 0.0  # seconds of decoding before prompts run here again
        self._since_join = 0
        self._dated = 0  # jobs with a deadline
        self._cancelled = False

    @property
    def ran(self) -> float:
        """Seconds in which the engine ran."""
        return sum(self.seconds.values()) - self._overlap

    @property
    def waiting(self) -> int:
        """Rows whose prompts have not run."""
        return len(self._prompts) + len(self._beside.waiting)

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
        return sum(job.cache_tokens for job in chain(self._beside.waiting, self._holding()))

    @property
    def backlog_seconds(self) -> float:
        """Seconds that an engine needs for the prompts that wait and the rationales that are to be written, as known.

        Which prompts will reason is not known; a rationale that is being written counts half.
        """
        prompts = self._prompt_seconds()
        rationales = (self.reasoning - self.decoded / 2) * self.costs.rationale(self.most)
        return max((prompts + rationales) / self._overlaps, rationales)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take in the jobs of a call. Raises OverloadError where they do not fit, and takes none."""
        now = self._clock()
        if self.load is not None:  # what is refused was asked for too: reasoning gives way before others do
            may = sum(job.yields for job in jobs)
            self.load.arrived(now, Work(len(jobs), sum(job.keeps for job in jobs) - may, may))
        self._admit(jobs, now)
        for job in jobs:
            job.arrived = now
            self._dated += job.deadline < math.inf
            job.call.scoring += job.call.chooses(job)
            self._prompts.add(job)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Let go of jobs that nobody waits for, before the next run; any thread may call this."""
        for job in jobs:
            job.cancelled = True
        self._cancelled = True

    def abandon(self, error: MmembError) -> None:
        """End all jobs with an error."""
        for job in self._every():
            self._end(job, error)

    def advance(self) -> bool:
        """Run the engine once; return False where there is nothing to run.

        Raises BackendError where the engine fails and the pace is patient.
        """
        now = self._clock()
        self._drop()
        self._settle(now)
        if self._beside.done:
            self._take_in()
        elif (room := self._room_to_prefill(now)) is not None:
            self._prefill(room)
        elif self._elsewhere:
            self._write()
        elif self._ready or self._live:
            self._step()
        elif self._beside.busy:
            self._take_in()
        else:
            return False
        return True

    def _admit(self, jobs: Sequence[Job], now: float) -> None:
        bounds, queue, wait = self._pace.bounds, self._prompts, self._prompt_seconds() / self._drains
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
                    retry_after=wait,
                )
        if wait > bounds.seconds:
            raise OverloadError(
                f"{wait:.3f} s of prompts wait before it, above the limit of {bounds.seconds:g} s: ask again later",
                reason="wait",
                retry_after=wait - bounds.seconds,
            )
        earliest = min((job.deadline for job in jobs), default=math.inf)
        busy = self.waiting or self.reasoning  # else it is tried, which shows what a run takes now
        if busy and now + wait + self.costs.prompts.run(1) > earliest:
            raise OverloadError(
                f"{wait:.3f} s of prompts wait before it, and its deadline is in {earliest - now:.3f} s: allow more, "
                "or ask again later",
                reason="deadline",
                retry_after=wait,
            )

    def _prompt_seconds(self) -> float:
        """Return the seconds of runs that the prompts that wait are to take."""
        seconds = self.costs.waiting(self._prompts.tokens)
        if self._beside.busy:
            left = self._beside.began + self.costs.prompts.run(len(self._beside.jobs)) - self._clock()
            seconds += max(left, 0.0)
        return seconds

    def _every(self) -> list[Job]:
        return [*self._prompts, *self._beside.waiting, *self._holding()]

    def _holding(self) -> Iterator[Job]:
        yield from chain.from_iterable(self._held.values())
        yield from self._ready
        yield from self._elsewhere
        yield from self._live.values()

    def _drop(self) -> None:
        """Let go of what nobody waits for any more."""
        if self._cancelled:
            self._cancelled = False
            for job in self._every():
                if job.cancelled:
                    self._end(job)

    def _settle(self, now: float) -> None:
        """Answer with what there is where a deadline nears, or where load takes reasoning away."""
        if self._dated:
            self._settle_dated(now)
        if self.load is not None:
            self._settle_load(self.load, now)

    def _settle_dated(self, now: float) -> None:
        for job in self._prompts.late(now):
            self._end(job, DeadlineError(f"its deadline passed {now - job.deadline:.3f} s ago, before its prompt ran"))
        step, waiting = self.costs.steps.run(len(self._live) or 1), min(len(self._prompts), self._pace.prompts)
        run = max(step, self.costs.prompts.run(waiting)) if waiting else step  # the longest that may be next
        busy = self._live or waiting  # else it costs nobody anything to try, and shows what a step takes now
        whole = step * self.costs.length.value if busy else 0
        for jobs, remaining in ((self._ready, max(whole, MARGIN * run)), (list(self._live.values()), MARGIN * run)):
            for job in [job for job in jobs if now + remaining > job.deadline]:
                self._degrade(job, "deadline")

    def _settle_load(self, load: LoadGate, now: float) -> None:
        backlog = Work(self.waiting, len(self._ready))
        load.update(now, backlog, self.costs.prompt(self._pace.prompts), self.costs.rationale(self.most))
        for job in [job for job in self._ready if job.yields and job.item.score < load.threshold]:
            job.item.threshold = load.threshold
            self._degrade(job, "load")

    def _degrade(self, job: Job, reason: str) -> None:
        """Answer a job that was to reason with its direct embedding, if it may be."""
        if job.exact:
            self._end(job, DeadlineError(f"{reason} leaves no time to reason: allow more, or let it do without"))
        else:
            job.item.degraded_by = reason
            self._end(job)

    def _room_to_prefill(self, now: float) -> int | None:
        """Return how many tokens more the KV cache may hold where prompts are next, else None."""
        first = self._prompts.first()
        if first is None:
            return None
        room = self._paths.limits.cache_bytes // self._paths.token_bytes - self.cache_tokens
        return room if self._prefills(first, room, now) else None

    def _prefills(self, first: Job, room: int, now: float) -> bool:
        """Return whether prompts are next, of which one is due first."""
        if not self.reasoning and not self._beside.busy:
            return True
        if first.keeps and first.cache_tokens > room:
            return False
        if self._pace.patient and not self._beside.free:
            return self.reasoning < self.most
        if first.keeps and len(self._ready) + len(self._elsewhere) >= self.most:
            return False
        if self._beside.free or not self.reasoning:
            return True
        if now + self.costs.prompts.run(1) + self.costs.steps.run(len(self._live)) > first.deadline:
            return True
        kept_up = self._beside.busy and first.arrived > self._beside.began  # the lane with what comes
        early = self._beside.busy and first.reasons and self.reasoning >= self.most
        return self._owed <= 0 and not kept_up and not early

    def _prefill(self, room: int) -> None:
        """Run prompts, in the lane where it is free: all beside steps, else half of them, and none that is alone.

        Those that run here beside steps too take no longer than the steps that are owed for it may.
        """
        most, seconds = self._pace.prompts, math.inf
        if self._beside.free and not self.reasoning:
            most = min(most, -(-len(self._prompts) // 2))
        elif self._beside.busy and self.reasoning and not self._pace.patient:
            seconds = self._stall * self._share / (1 - self._share)
        fits = partial(self._fits, room, most, seconds)
        jobs = self._prompts.batch(fits, padding=math.inf if self._pace.patient else self.costs.padding)
        if self._beside.free and (len(self._prompts) > len(jobs) or self.reasoning):
            self._beside.begin(jobs)
            self._prompts.remove(*jobs)
            return
        began = self._clock()
        try:
            result = self._paths.fast_path.run([job.item.row for job in jobs], keep=jobs[0].keeps)
        except BackendError as error:
            self._prompts.remove(*jobs)
            self._failed(jobs, error)
            return
        self._prompts.remove(*jobs)
        seconds = self._clock() - began
        self._overlap += seconds if self._beside.busy else 0
        self._owed = max(min(seconds * (1 - self._share) / self._share, self._stall), 1e-9)
        self._prefilled(Ran(jobs, result, began, seconds), jobs)

    def _take_in(self) -> None:
        """Wait for what runs in the lane, and go on with those that have not left."""
        try:
            ran = self._beside.end()
        except BackendError as error:
            self._failed(self._beside.let_go(), error, ran=len(self._beside.jobs))
            return
        self._overlap -= self._clock() - ran.began - ran.seconds  # a run here that took longer
        self._prefilled(ran, self._beside.let_go())

    def _prefilled(self, ran: Ran, jobs: Sequence[Job]) -> None:
        """Go on with those jobs whose prompts have run that have not left."""
        result, places = ran.result, {job: place for place, job in enumerate(ran.jobs)}
        self.costs.prefilled(len(places), len(places) * max(job.item.row.length for job in places), ran.seconds)
        self.seconds["prefill"] += ran.seconds
        for job in jobs:
            item, place = job.item, places[job]
            item.embedding_D, item.score = result.embeddings_BD[place], float(result.scores_B[place])
            item.queued, item.fast_path = ran.began - job.arrived, ran.seconds
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

    @property
    def _stall(self) -> float:
        """Seconds for which steps go on at most while prompts wait."""
        return max(STALL, GATHER * self.costs.steps.run(len(self._live)))

    def _fits(self, room: int, most: int, seconds: float, jobs: int, tokens: int, *, after: int | None) -> bool:
        if jobs > most or jobs * tokens > self._paths.limits.tokens or self.costs.waiting(jobs * tokens) > seconds:
            return False
        if after is not None and jobs * (tokens + after) > room:
            return False
        return self._paths.fast_path.fits(jobs, tokens, after=None if after is None else 0)

    def _reasons(self, job: Job) -> bool:
        """Return whether a job reasons by its score."""
        item, policy = job.item, job.policy
        if job.reasons or not job.keeps:
            return job.reasons
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
        if not rows:  # none could join
            return
        try:
            ended = self._decoding.step()
        except BackendError as error:
            jobs = list(self._live.values())
            self._decoding.leave(self._live)
            self._live = {}
            self._failed(jobs, error)
            return
        now = self._clock()
        self.costs.stepped(rows, now - began)
        self.seconds["decode"] += now - began
        self._overlap += now - began if self._beside.busy else 0
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
        if not free or not self._ready:
            return
        joining = self._ready[:free]
        if alone := [job for job in (*self._live.values(), *self._ready) if job.alone]:
            joining = [] if self._live else alone[:1]
        few = len(joining) < min(free, self.most // 4) and self._since_join < GATHER
        if not joining or (self._live and few):
            return
        caches = [job.cache for job in joining if job.cache is not None]
        self._ready = [job for job in self._ready if job not in joining]
        try:
            written = self._decoding.join(caches, [job.max_tokens for job in joining])
        except BackendError as error:  # no memory for longer rows
            self._failed(joining, error)
            return
        self._live |= dict(zip(written, joining, strict=True))
        self._since_join, now = 0, self._clock()
        for writing, job in zip(written, joining, strict=True):
            job.item.held = now - job.arrived - job.item.queued - job.item.fast_path
            job.writing, job.began = writing, now

    def _failed(self, jobs: Sequence[Job], error: BackendError, ran: int | None = None) -> None:
        """Run jobs again one by one, or end the one that failed alone; of `ran` rows where some have left since."""
        ran = len(jobs) if ran is None else ran
        if self._pace.patient:
            raise error
        LOGGER.warning("a run of %d rows failed: %s", ran, error)
        error = error.with_traceback(None)  # whose frames hold caches
        for job in jobs:
            job.alone, job.writing = True, None
            if ran == 1:
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
        elif job in self._beside.waiting:
            self._beside.waiting.remove(job)
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
        self._dated -= job.deadline < math.inf
        job.cache, job.writing, job.error = None, None, error
        if job.item.embedding_D is None and call.chooses(job):
            call.scoring -= 1
            self._choose(call, set())
        job.ended(job)
