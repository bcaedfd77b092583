"""The service that the HTTP contracts call: an embedder behind a scheduler, which many requests share."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import DeadlineError, MmembError, OverloadError
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.preparer import Prepared
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.routing.costs import Costs, Mean
from mmemb_deploy.routing.jobs import Bounds, Job, Pace
from mmemb_deploy.routing.load import LoadGate
from mmemb_deploy.routing.scheduler import Scheduler
from mmemb_deploy.serve.ask import Ask, Ended, Event, Scored, Wrote
from mmemb_deploy.serve.engine import EngineThread
from mmemb_deploy.serve.light import is_light

WAITING_TOKENS = 2**20  # of prompts that have not run
WAITING_BYTES = 2**30  # of decoded pixels in them
WARM_ROWS = 8  # of the batches from which the costs of full ones are known at first


class Service:
    """Embeds what many requests ask, together; in one event loop, with one engine thread."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        max_waiting_rows: int = 4096,
        max_wait: float = math.inf,
        batch_size: int = 32,
        patience: float = 0.5,
    ) -> None:
        """`batch_size` are the rows that run together; `patience` the seconds that a row may wait before load is high.

        `max_waiting_rows` bounds the inputs that are accepted and not yet answered; a request before which prompts of
        more than `max_wait` seconds wait is refused.
        """
        self.embedder = embedder
        self.ready = False
        gate = embedder.manifest.gate
        curve, overlaps = () if gate is None else gate.curve, embedder.paths.lane is not None
        self._load = LoadGate(curve, patience=patience, overlaps=overlaps)
        bounds = Bounds(tokens=WAITING_TOKENS, media_bytes=WAITING_BYTES, seconds=max_wait)
        pace = Pace(prompts=batch_size, rationales=batch_size, patient=False, bounds=bounds)
        self.scheduler = Scheduler(embedder.paths, pace, time.monotonic, load=self._load)
        self._engine = EngineThread(self.scheduler)
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._limit, self._rows = max_waiting_rows, 0
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self) -> None:
        """Run each path, so that no request pays for what an engine does the first time, and costs are known.

        From then on until `drain`, the process's garbage collector passes over what lives now: nearly none of it ever
        is garbage, and to look at 170,000 objects stops every thread for up to a quarter of a second.
        """
        self._engine.start()
        modes: list[EncodeOptions] = [{"reasoning": "never"}]
        if self.embedder.reasons:
            modes.insert(0, {"reasoning": "always", "max_rationale_tokens": 2})
        for _ in range(2):
            self.scheduler.costs = Costs()  # without what the first runs cost
            for rows in (1, min(WARM_ROWS, self._limit)):
                for options in modes:
                    await self.embed(Ask(inputs=["one"] * rows, options=options))
        self.scheduler.costs.length = Mean()
        gc.freeze()
        self.ready = True

    async def embed(self, ask: Ask) -> EncodeResult:
        """Return all rows of a request, or raise.

        Raises InputError with the index of a bad input, OptionError, OverloadError, DeadlineError, BackendError.
        Cancelling the awaiting task ends the work before the engine's next run.
        """
        deadline = _deadline(ask)
        with self._accepted(len(ask.inputs)):
            prepared = await self._prepare(ask)
            loop = asyncio.get_running_loop()
            done: asyncio.Future[None] = loop.create_future()
            jobs = self._jobs(prepared, ask, deadline)
            left = len(jobs)

            def ended(job: Job) -> None:
                nonlocal left
                left -= 1
                if job.error is not None or not left:
                    loop.call_soon_threadsafe(_finish, done, job.error)

            for job in jobs:
                job.ended = ended
            if jobs:
                self._submit(jobs, ask, lambda error: loop.call_soon_threadsafe(_finish, done, error))
                try:
                    await done
                finally:
                    if left:
                        self.scheduler.cancel(jobs)
            result = self.embedder.result(prepared)
            if (late := time.monotonic() - deadline) > 0:
                raise DeadlineError(f"it was done {late:.3f} s after its deadline: allow more, or ask again later")
            return result

    async def watch(self, ask: Ask) -> AsyncGenerator[Event]:
        """Embed one input and yield one Scored, any number of Wrote, one Ended; closing it gives the work up.

        Raises as `embed`, before the first of them or between.
        """
        began, deadline = time.perf_counter(), _deadline(ask)
        with self._accepted(len(ask.inputs)):
            prepared = await self._prepare(ask)
            loop = asyncio.get_running_loop()
            events: asyncio.Queue[list[int] | MmembError | Floats | None] = asyncio.Queue()

            def tell(event: list[int] | MmembError | Floats | None) -> None:
                loop.call_soon_threadsafe(events.put_nowait, event)

            (job,) = jobs = self._jobs(prepared, ask, deadline)
            job.scored = lambda job: tell(job.item.embedding_D)
            job.wrote = lambda job: tell([] if job.writing is None else list(job.writing.token_ids))
            job.ended = lambda job: tell(job.error)
            self._submit(jobs, ask, tell)
            told, decode = "", self.embedder.encoder.prompt.decode
            try:
                while (event := await events.get()) is not None:
                    if isinstance(event, MmembError):
                        raise event
                    if isinstance(event, list):
                        words = decode(event)
                        if len(words) > len(told) and not words.endswith("\N{REPLACEMENT CHARACTER}"):
                            yield Wrote(words[len(told) :])
                            told = words
                    else:
                        yield Scored(job.item.score, self.threshold, event, time.perf_counter() - began)
            finally:
                self.scheduler.cancel(jobs)
            result = self.embedder.result(prepared)
            (detail,) = result.details
            assert detail is not None
            yield Ended(detail, result.embeddings[0], time.perf_counter() - began)

    @property
    def alive(self) -> bool:
        """Whether the engine can still be asked; if not, only a restart helps."""
        return self._engine.defect is None

    @property
    def threshold(self) -> float | None:
        """Gate score from which an input reasons now, None without a gate."""
        gate = self.embedder.manifest.gate
        return None if gate is None else max(gate.threshold, self._load.threshold)

    @property
    def backlog_seconds(self) -> float:
        """Seconds of work that the engine has before it, by what runs have cost."""
        return self.scheduler.backlog_seconds

    @property
    def engine_seconds(self) -> float:
        """Seconds in which the engine has run, since the start."""
        return self.scheduler.ran

    async def drain(self, seconds: float) -> None:
        """Accept nothing more, wait at most so long for what was accepted, and let go of the rest."""
        self.ready, self._draining = False, True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self.alive:
            late = OverloadError("the server stops: ask another one", reason="draining", retry_after=1.0)
            self._engine.call(lambda: self.scheduler.abandon(late))
        await asyncio.to_thread(self._engine.stop)
        gc.unfreeze()

    def figures(self) -> Mapping[str, float]:
        """Return what /metrics shows of the queues now; `mmemb_deploy.serve.metrics.FIGURES` lists the names."""
        scheduler, paths = self.scheduler, self.embedder.paths
        features = paths.fast_path.vision.cache
        figures = {
            "num_requests_running": float(scheduler.decoded),
            "num_requests_waiting:prompt": float(scheduler.waiting),
            "num_requests_waiting:reasoning": float(scheduler.reasoning - scheduler.decoded),
            "mm_cache_queries": float(features.asked),
            "mm_cache_hits": float(features.found),
            "kv_cache_usage_perc": scheduler.cache_tokens * paths.token_bytes / paths.limits.cache_bytes,
        }
        if self.threshold is not None:
            figures["gate_threshold"] = self.threshold
        figures |= {f"engine_seconds:{run}": seconds for run, seconds in scheduler.seconds.items()}
        return figures

    @contextmanager
    def _accepted(self, rows: int) -> Generator[None]:
        """Count a request's inputs while they are not answered. Raises OverloadError where there is no room."""
        if self._draining:
            raise OverloadError("the server is stopping: ask another one", reason="draining", retry_after=1.0)
        if self._rows + rows > self._limit:
            raise OverloadError(
                f"{self._rows} inputs wait, and {rows} more exceed the limit of {self._limit}: ask again later, or for "
                "fewer",
                reason="rows",
                retry_after=1.0,
            )
        self._rows += rows
        self._empty.clear()
        try:
            yield
        finally:
            self._rows -= rows
            if not self._rows:
                self._empty.set()

    async def _prepare(self, ask: Ask) -> Prepared:
        def prepare() -> Prepared:
            return self.embedder.prepare(ask.inputs, **ask.options)

        if is_light(ask.inputs):
            return prepare()
        return await asyncio.get_running_loop().run_in_executor(self._readers, prepare)

    def _jobs(self, prepared: Prepared, ask: Ask, deadline: float) -> list[Job]:
        jobs = self.embedder.jobs(prepared)
        options = prepared.options
        judged = options.reasoning == "auto" and options.threshold is None and options.reasoning_rate is None
        for job in jobs:
            job.priority = ask.priority
            job.deadline = deadline
            job.yields = judged and ask.on_overload == "direct"
            job.exact = ask.on_overload == "reject"
        return jobs

    def _submit(self, jobs: Sequence[Job], ask: Ask, failed: Callable[[MmembError], object]) -> None:
        def submit() -> None:
            try:
                self.scheduler.submit(jobs)
            except OverloadError as error:
                failed(error)

        gate = self.embedder.manifest.gate
        if ask.on_overload == "reject" and gate is not None and self._load.threshold > gate.threshold:
            raise OverloadError(
                f"load lets only inputs of a score from {self._load.threshold:.2f} reason: ask again later, or let "
                "on_overload be 'direct' or 'wait'",
                reason="load",
                retry_after=1.0,
            )
        self._engine.call(submit)


def _deadline(ask: Ask) -> float:
    """Return it by the scheduler's clock, counted from now: an input may wait for its reader too."""
    return math.inf if ask.deadline is None else time.monotonic() + ask.deadline


def _finish(done: asyncio.Future[None], error: MmembError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
