"""The one thread that may use an engine: it runs a scheduler, and sleeps while there is nothing to run."""

from __future__ import annotations

from collections.abc import Callable
from logging import getLogger
from queue import Empty, SimpleQueue
from threading import Thread

from mmemb_deploy.errors import BackendError
from mmemb_deploy.routing.scheduler import Scheduler

LOGGER = getLogger("mmemb_deploy.serve")


class EngineThread:
    """Calls what it is given between two runs of the engine; ends for good at the first defect."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.defect: Exception | None = None
        self._scheduler = scheduler
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._guarded, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def call(self, work: Callable[[], None]) -> None:
        """Let the thread call `work`, and go on running what there is. Raises BackendError after a defect."""
        if self.defect is not None:
            raise BackendError(f"the engine has stopped by a defect, {self.defect!r}: start the server again")
        self._inbox.put(work)

    def stop(self) -> None:
        """End after the run at hand, and wait for that."""
        self._inbox.put(None)
        self._thread.join()

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as error:
            LOGGER.critical("the engine thread ends: no request can be answered any more", exc_info=error)
            self.defect = error
            self._scheduler.abandon(BackendError(f"the engine has stopped by a defect, {error!r}"))

    def _run(self) -> None:
        busy = False
        while True:
            try:
                while (work := self._inbox.get(block=not busy)) is not None:
                    work()
                    busy = True
                return
            except Empty:
                busy = self._scheduler.advance()
