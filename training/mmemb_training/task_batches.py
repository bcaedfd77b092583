"""Which samples a step sees: a function of its number, each pass over the data in another order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mmemb_deploy.errors import OptionError
from mmemb_training.samples import Sample


class TaskBatches:
    """Batches of one task each, so that negatives are of the kind that the task confuses; tasks by their size.

    What is left of a task when its full batches are drawn waits for the next pass, in another order. Raises OptionError
    if no task fills a batch.
    """

    def __init__(self, samples: Sequence[Sample], size: int, seed: int) -> None:
        self._samples = samples
        self._size = size
        self._seed = seed
        self._tasks: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            self._tasks.setdefault(sample.question.task, []).append(index)
        self.per_pass = sum(len(members) // size for members in self._tasks.values())
        if not self.per_pass:
            largest = max(map(len, self._tasks.values()), default=0)
            raise OptionError(f"batch is {size}: the largest task has {largest} samples, and a batch is of one task")
        self._order = lru_cache(maxsize=1)(self._shuffled)

    def __call__(self, step: int) -> list[Sample]:
        """Return the batch of a step."""
        passes, number = divmod(step, self.per_pass)
        return [self._samples[index] for index in self._order(passes)[number]]

    def _shuffled(self, passes: int) -> list[list[int]]:
        rng = np.random.default_rng([self._seed, passes])
        batches = []
        for members in self._tasks.values():
            order = rng.permutation(members).tolist()
            full = len(order) - len(order) % self._size
            batches += [order[start : start + self._size] for start in range(0, full, self._size)]
        return [batches[index] for index in rng.permutation(len(batches))]
