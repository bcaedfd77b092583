"""A fast path on a thread of its own: prompts run there while others, or steps of rationales, run elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from mmemb_deploy.inputs.rows import Row
from mmemb_deploy.routing.fast_path import FastPath, FastResult
from mmemb_deploy.routing.jobs import Job


class Prefilling(Protocol):
    """Prompts that run."""

    def done(self) -> bool:
        """Return whether they have run."""
        ...

    def result(self) -> tuple[FastResult, float]:
        """Wait for what becomes of them, and when that was. Raises BackendError if the engine failed."""
        ...


class Lane(Protocol):
    """Where prompts run beside what the engine does, one batch at a time."""

    def begin(self, rows: Sequence[Row], *, keep: bool, clock: Callable[[], float]) -> Prefilling:
        """Let rows' prompts run, as `FastPath.run` does; `clock` tells when they have."""
        ...


class PrefillLane:
    """A `Lane` of real time."""

    def __init__(self, fast_path: FastPath) -> None:
        self._fast_path = fast_path
        self._start()

    def _start(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefill")
        self._process = os.getpid()

    def begin(self, rows: Sequence[Row], *, keep: bool, clock: Callable[[], float]) -> Future[tuple[FastResult, float]]:
        """Let rows' prompts run."""
        if self._process != os.getpid():  # a forked process has none of its parent's threads
            self._start()
        return self._thread.submit(lambda: (self._fast_path.run(rows, keep=keep), clock()))


@dataclass(frozen=True)
class Ran:
    """Prompts that have run together, when they began, and for how many seconds."""

    jobs: Sequence[Job]
    result: FastResult
    began: float
    seconds: float


class Beside:
    """What a scheduler has in its lane, if it has one."""

    def __init__(self, lane: Lane | None, clock: Callable[[], float]) -> None:
        self.lane = lane
        self.jobs: Sequence[Job] = ()  # whose prompts run there, or ran last
        self.waiting: list[Job] = []  # those of them that have not left
        self.began = 0.0
        self._clock = clock
        self._run: Prefilling | None = None

    @property
    def free(self) -> bool:
        """Whether prompts can begin."""
        return self.lane is not None and self._run is None

    @property
    def busy(self) -> bool:
        """Whether prompts run, or have run and were not taken in."""
        return self._run is not None

    @property
    def done(self) -> bool:
        """Whether prompts have run."""
        return self._run is not None and self._run.done()

    def begin(self, jobs: Sequence[Job]) -> None:
        """Let jobs' prompts run."""
        assert self.lane is not None
        self.began = self._clock()
        self._run = self.lane.begin([job.item.row for job in jobs], keep=jobs[0].keeps, clock=self._clock)
        self.jobs, self.waiting = jobs, list(jobs)

    def end(self) -> Ran:
        """Wait for them; it is free again. Raises BackendError if the engine failed."""
        assert self._run is not None
        run, self._run = self._run, None
        result, ended = run.result()
        return Ran(self.jobs, result, self.began, ended - self.began)

    def let_go(self) -> list[Job]:
        """Return the jobs that have not left; none waits any more."""
        jobs, self.waiting = self.waiting, []
        return jobs
