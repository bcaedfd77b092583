"""The service that the HTTP contracts call: it takes what was asked, and embeds it away from the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import DeadlineError, OverloadError
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.results import EncodeResult


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one request wants of all of its inputs."""

    inputs: Sequence[Any]  # as `Embedder.encode` takes them
    options: EncodeOptions
    priority: int = 0  # lower first
    deadline: float | None = None  # seconds from now
    on_overload: str = "direct"  # "direct": embed without reasoning; "reject"; or "wait"


class Service:
    """Embeds one request after the other, in the one thread that may use the engine."""

    def __init__(self, embedder: Embedder, *, max_waiting_rows: int = 4096) -> None:
        self.embedder = embedder
        self.ready = False
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._limit, self._rows = max_waiting_rows, 0
        self._draining = False
        self._works: set[asyncio.Future[EncodeResult]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self) -> None:
        """Run each path once, so that no request pays for what an engine does the first time."""
        for reasoning in ("never", "always") if self.embedder.reasons else ("never",):
            await self._run(["one"], {"reasoning": reasoning})
        self.ready = True

    async def embed(self, ask: Ask) -> EncodeResult:
        """Return all rows of a request, or raise.

        Raises InputError with the index of a bad input, OptionError, OverloadError, DeadlineError, BackendError.
        Cancelling the awaiting task cancels the work, where it has not begun.
        """
        if self._draining:
            raise _stopping()
        if self._rows + len(ask.inputs) > self._limit:
            raise OverloadError(
                f"{self._rows} inputs wait, and {len(ask.inputs)} more exceed the limit of {self._limit}: ask again "
                "later, or for fewer",
                reason="rows",
                retry_after=1.0,
            )
        self._rows += len(ask.inputs)
        self._empty.clear()
        try:
            async with asyncio.timeout(ask.deadline):
                return await self._run(ask.inputs, ask.options)
        except TimeoutError as error:
            raise DeadlineError("the deadline passed before there was an answer") from error
        finally:
            self._rows -= len(ask.inputs)
            if not self._rows:
                self._empty.set()

    async def drain(self, seconds: float) -> None:
        """Accept nothing more, and wait at most so long for what was accepted."""
        self.ready, self._draining = False, True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), seconds)
        for work in tuple(self._works):
            work.cancel()
        self._engine.shutdown(wait=False, cancel_futures=True)

    def figures(self) -> Mapping[str, float]:
        """Return what /metrics shows of the queues now; `mmemb_deploy.serve.metrics.FIGURES` lists the names."""
        return {"num_requests_running": float(self._rows)}

    async def _run(self, inputs: Sequence[Any], options: EncodeOptions) -> EncodeResult:
        work = asyncio.wrap_future(self._engine.submit(self.embedder.encode_detailed, inputs, **options))
        self._works.add(work)
        try:
            return await work
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _stopping() from error  # the work was cancelled, not who awaits it
        finally:
            self._works.discard(work)


def _stopping() -> OverloadError:
    return OverloadError("the server is stopping: ask another one", reason="draining", retry_after=1.0)
