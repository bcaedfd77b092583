"""A worker in a thread of the service's own process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread

from mmemb_deploy.serve.messages import Message, Report
from mmemb_deploy.serve.worker import Worker, run


class EngineThread:
    """The one thread that may use the engine; see `mmemb_deploy.serve.messages.Runner`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()

    async def start(self, heard: Callable[[Report], None]) -> None:
        """Begin."""
        loop = asyncio.get_running_loop()

        def tell(report: Report) -> None:
            loop.call_soon_threadsafe(heard, report)

        self._thread = Thread(target=run, args=(self.worker, self._receive, tell), name="engine", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Hand it over as it is."""
        self._inbox.put(message)

    async def stop(self) -> None:
        """End after the run at hand."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _receive(self, wait: bool) -> Sequence[Message | None]:
        received: list[Message | None] = []
        try:
            while True:
                received.append(self._inbox.get(block=wait and not received))
        except Empty:
            return received
