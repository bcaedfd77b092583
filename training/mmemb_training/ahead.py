"""Work ahead of a step: what the next one needs is made in threads while this one runs.

Threads are enough: Pillow decodes and resizes, and tokenizers tokenise, without Python's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Generic, TypeVar

A = TypeVar("A")
T = TypeVar("T")
MOST_THREADS = 16


def in_threads(make: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """Return what `make` makes of each item, in their order; raises what it raises."""
    return list(_threads().map(make, items))


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun says: they share the cores
    count = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // processes))
    return ThreadPoolExecutor(count, thread_name_prefix="decoder")


class Ahead(Generic[T]):
    """What `make` makes of the numbers below `until`, asked for in turn: number n + 1 is begun when n is asked for.

    Two are in memory at once. `make` must depend on the number alone; what it raises, asking for that number raises.
    """

    def __init__(self, make: Callable[[int], T], until: int) -> None:
        self._make = make
        self._until = until
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._begun: tuple[int, Future[T]] | None = None

    def __call__(self, number: int) -> T:
        begun, self._begun = self._begun, None
        made = begun[1] if begun is not None and begun[0] == number else self._thread.submit(self._make, number)
        if number + 1 < self._until:
            self._begun = number + 1, self._thread.submit(self._make, number + 1)
        return made.result()
