"""Which samples a step sees: a function of its number, each pass over the data in another order."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.preprocess import Ints


def shuffled(count: int, size: int, number: int, seed: int) -> tuple[int, list[int]]:
    """Return in which pass over `count` samples a batch is, and the places of its `size` samples, or all."""
    size = min(size, count)
    passes, turn = divmod(number, count // size)
    order = np.random.default_rng([seed, passes]).permutation(count)
    return passes, order[turn * size : (turn + 1) * size].tolist()


class TaskBatches:
    """Batches of one task each, so that negatives are of the kind that the task confuses; tasks by their size.

    `task_N` numbers the task of every sample. What is left of a task when its full batches are drawn waits for the next
    pass, in another order; 12 bytes of a sample are held. Raises OptionError if no task fills a batch.
    """

    def __init__(self, task_N: NDArray[np.integer], size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        tasks, first_T = np.unique(task_N, return_index=True)
        self._members = [np.flatnonzero(task_N == task).astype(np.int32) for task in tasks[np.argsort(first_T)]]
        self.per_pass = sum(len(members) // size for members in self._members)
        if not self.per_pass:
            largest = max(map(len, self._members), default=0)
            raise OptionError(f"batch is {size}: the largest task has {largest} samples, and a batch is of one task")
        self._order = lru_cache(maxsize=1)(self._shuffled)

    def __call__(self, step: int) -> list[int]:
        """Return the samples' places of a step."""
        passes, number = divmod(step, self.per_pass)
        places: list[int] = self._order(passes)[number].tolist()
        return places

    def _shuffled(self, passes: int) -> Ints:
        rng = np.random.default_rng([self._seed, passes])
        batches = []
        for members in self._members:
            order = rng.permutation(members)
            batches.append(order[: len(order) - len(order) % self._size].reshape(-1, self._size))
        return rng.permutation(np.concatenate(batches))
