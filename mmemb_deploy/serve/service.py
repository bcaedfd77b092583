"""The service that the HTTP contracts call: an embedder behind a scheduler, which many requests share."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Self

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import BackendError, DeadlineError, OverloadError
from mmemb_deploy.preparer import Prepared, Preparer
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.serve.ask import Ask, Ended, Event, Scored, Wrote
from mmemb_deploy.serve.light import is_light
from mmemb_deploy.serve.messages import Abandon, Cancel, End, Found, Order, Report, Runner, State, Told
from mmemb_deploy.serve.thread import EngineThread
from mmemb_deploy.serve.worker import Limits, Worker


class Service:
    """Embeds what many requests ask, together; in one event loop, with one engine."""

    def __init__(self, preparer: Preparer, engine: Runner, *, max_waiting_rows: int = 4096) -> None:
        """`max_waiting_rows` bounds the inputs that are accepted and not yet answered."""
        self.preparer = preparer
        self.ready = False
        self._engine = engine
        self._defect: str | None = None
        self._state: State | None = None  # as the engine told it last
        self._listeners: dict[int, Callable[[Told], None]] = {}  # of orders, by their numbers
        self._orders = 0
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._limit, self._rows = max_waiting_rows, 0
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    @classmethod
    def in_thread(cls, embedder: Embedder, *, max_waiting_rows: int = 4096, limits: Limits | None = None) -> Self:
        """Return a service whose engine runs in a thread of this process."""
        worker = Worker(embedder, limits or Limits())
        return cls(embedder, EngineThread(worker), max_waiting_rows=max_waiting_rows)

    async def start(self) -> None:
        """Wait until the engine is warm. Raises BackendError where it has a defect.

        From then on until `drain`, the process's garbage collector passes over what lives now: nearly none of it ever
        is garbage, and to look at 170,000 objects stops every thread for up to a quarter of a second.
        """
        self._warm = asyncio.Event()
        await self._engine.start(self._heard)
        await self._warm.wait()
        self._check_alive()
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
            done: asyncio.Future[End] = asyncio.get_running_loop().create_future()

            def told(event: Told) -> None:
                if isinstance(event, End) and not done.done():
                    done.set_result(event)

            if prepared.items:
                with self._ordered(prepared, ask, deadline, told):
                    _take(await done, prepared)
            result = self.preparer.result(prepared)
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
            events: asyncio.Queue[Told] = asyncio.Queue()
            written, decode = "", self.preparer.encoder.prompt.decode
            with self._ordered(prepared, ask, deadline, events.put_nowait, watched=True):
                while not isinstance(event := await events.get(), End):
                    if isinstance(event, Found):
                        yield Scored(event.score, self.threshold, event.embedding_D, time.perf_counter() - began)
                        continue
                    words = decode(event)
                    if len(words) > len(written) and not words.endswith("\N{REPLACEMENT CHARACTER}"):
                        yield Wrote(words[len(written) :])
                        written = words
            _take(event, prepared)
            result = self.preparer.result(prepared)
            (detail,) = result.details
            assert detail is not None
            yield Ended(detail, result.embeddings[0], time.perf_counter() - began)

    @property
    def alive(self) -> bool:
        """Whether the engine can still be asked; if not, only a restart helps."""
        return self._defect is None

    @property
    def threshold(self) -> float | None:
        """Gate score from which an input reasons now, None without a gate."""
        gate = self.preparer.manifest.gate
        return self._state.threshold if self._state is not None else None if gate is None else gate.threshold

    @property
    def backlog_seconds(self) -> float:
        """Seconds of work that the engine has before it, by what runs have cost."""
        return 0.0 if self._state is None else self._state.backlog_seconds

    @property
    def engine_seconds(self) -> float:
        """Seconds in which the engine has run, since the start."""
        return 0.0 if self._state is None else self._state.engine_seconds

    def figures(self) -> Mapping[str, float]:
        """Return what /metrics shows of the queues; `mmemb_deploy.serve.metrics.FIGURES` lists the names."""
        return {} if self._state is None else self._state.figures

    async def drain(self, seconds: float) -> None:
        """Accept nothing more, wait at most so long for what was accepted, and let go of the rest."""
        self.ready, self._draining = False, True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self.alive:
            late = OverloadError("the server stops: ask another one", reason="draining", retry_after=1.0)
            self._engine.send(Abandon(late))
        await self._engine.stop()
        gc.unfreeze()

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
            return self.preparer.prepare(ask.inputs, **ask.options)

        if is_light(ask.inputs):
            return prepare()
        return await asyncio.get_running_loop().run_in_executor(self._readers, prepare)

    @contextmanager
    def _ordered(
        self, prepared: Prepared, ask: Ask, deadline: float, told: Callable[[Told], None], *, watched: bool = False
    ) -> Generator[None]:
        """Let the engine run what is prepared, and `told` hear of it; whoever leaves before its end gives it up."""
        self._check_alive()
        self._orders += 1
        number = self._orders

        def listen(event: Told) -> None:
            if isinstance(event, End):
                del self._listeners[number]
            told(event)

        self._listeners[number] = listen
        rows = [(item.index, item.row, item.given) for item in prepared.items]
        asked = (ask.priority, deadline, ask.on_overload)
        self._engine.send(Order(number, rows, prepared.options, prepared.policy, *asked, watched))
        try:
            yield
        finally:
            if self._listeners.pop(number, None) is not None and self.alive:
                self._engine.send(Cancel(number))

    def _heard(self, report: Report) -> None:
        self._state = report.state or self._state
        for number, event in report.told:
            if (listen := self._listeners.get(number)) is not None:
                listen(event)
        if report.defect is not None:
            self._defect = report.defect
            for listen in list(self._listeners.values()):
                listen(End(self._dead()))
        self._warm.set()

    def _check_alive(self) -> None:
        if not self.alive:
            raise self._dead()

    def _dead(self) -> BackendError:
        return BackendError(f"{self._defect}: start the server again")


def _deadline(ask: Ask) -> float:
    """Return it by the scheduler's clock, counted from now: an input may wait for its reader too."""
    return math.inf if ask.deadline is None else time.monotonic() + ask.deadline


def _take(end: End, prepared: Prepared) -> None:
    """Put what was found of an order's inputs to them. Raises the error that ended it."""
    if end.error is not None:
        raise end.error
    for item, outcome in zip(prepared.items, end.outcomes, strict=True):
        item.outcome = outcome
