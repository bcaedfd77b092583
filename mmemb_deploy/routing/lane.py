"""A fast path on a thread of its own: prompts run there while rationales are written."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from mmemb_deploy.inputs.rows import Row
from mmemb_deploy.routing.fast_path import FastPath, FastResult


class Prefilling(Protocol):
    """Prompts that run."""

    def done(self) -> bool:
        """Return whether they have run."""
        ...

    def result(self) -> FastResult:
        """Wait for them. Raises BackendError if the engine failed."""
        ...


class Lane(Protocol):
    """Where prompts run beside steps, one batch at a time."""

    def begin(self, rows: Sequence[Row], *, keep: bool) -> Prefilling:
        """Let rows' prompts run, as `FastPath.run` does."""
        ...


class PrefillLane:
    """A `Lane` of real time."""

    def __init__(self, fast_path: FastPath) -> None:
        self._fast_path = fast_path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefill")

    def begin(self, rows: Sequence[Row], *, keep: bool) -> Future[FastResult]:
        """Let rows' prompts run."""
        return self._thread.submit(self._fast_path.run, rows, keep=keep)
