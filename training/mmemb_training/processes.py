"""Who shares a job: several processes, each with its part of the questions, its own files, and barriers between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's number among how many, and how they wait for each other; by default there is one."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def main(self) -> bool:
        """Whether this is the one that does what is done once."""
        return self.index == 0

    def share(self, of: Sequence[T]) -> Sequence[T]:
        """Return this process's part of what all have; parts are disjoint, whatever was done with another count."""
        return of[self.index :: self.count]

    def array(self, store: Path | None, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array to fill together: mapped from `store`, a .npy file written anew, or in memory for one alone.

        What others wrote is there after a `wait`.
        """
        if store is None:
            assert self.count == 1, "several processes share an array through a file"
            return np.empty(shape, dtype)
        if self.main:
            np.lib.format.open_memmap(store, mode="w+", dtype=dtype, shape=shape)
        self.wait()
        return np.lib.format.open_memmap(store, mode="r+")


ALONE = Processes()
