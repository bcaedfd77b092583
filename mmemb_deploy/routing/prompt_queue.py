"""Jobs whose prompts have not run: the first of them is due, and others are like it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush, merge
from itertools import count
from typing import Protocol

from mmemb_deploy.routing.jobs import Job

Key = tuple[bool, bool, int, tuple[tuple[int, int], ...], int]


class Fits(Protocol):
    """Whether so many prompts of so many tokens run together; `after` tokens may follow each, None keeps no cache."""

    def __call__(self, jobs: int, tokens: int, *, after: int | None) -> bool: ...


class PromptQueue:
    """Jobs whose prompts have not run: by when they are due, and by what can run together."""

    def __init__(self) -> None:
        self.tokens = self.media_bytes = 0
        self._due: list[tuple[float, Key, Job]] = []  # a heap, in which those that have left remain for a while
        self._alike: list[tuple[Key, Job]] = []  # sorted
        self._keys: dict[Job, Key] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._keys))

    def __contains__(self, job: Job) -> bool:
        return job in self._keys

    def add(self, job: Job) -> None:
        """Take in a job."""
        row = job.item.row
        key = (job.alone, job.keeps, row.length, tuple(visual.grid for visual in row.visuals), next(self._numbers))
        self._keys[job] = key
        insort(self._alike, (key, job))
        heappush(self._due, (job.due, key, job))
        self._count(job, 1)

    def remove(self, *jobs: Job) -> None:
        """Let jobs go."""
        for job in jobs:
            key = self._keys.pop(job)
            del self._alike[bisect_left(self._alike, (key,))]
            self._count(job, -1)

    def _count(self, job: Job, sign: int) -> None:
        self.tokens += sign * job.item.row.length
        self.media_bytes += sign * job.media_bytes

    def first(self) -> Job | None:
        """Return the job that is due first."""
        while self._due and self._keys.get(self._due[0][2]) != self._due[0][1]:
            heappop(self._due)
        return self._due[0][2] if self._due else None

    def late(self, now: float) -> list[Job]:
        """Return the jobs whose deadline has passed."""
        return [job for job in self._keys if job.deadline < now]

    def batch(self, fits: Fits, *, padding: float) -> list[Job]:
        """Return the job that is due first, and those nearest to it in length, with so many tokens of padding at most.

        Padding is worth what another run would cost, see `Costs.padding`.
        """
        first = self.first()
        assert first is not None
        jobs, tokens = [first], first.item.row.length
        longest, after = tokens, first.after
        for job in () if first.alone else self._nearest(first):
            length, follow = max(longest, job.item.row.length), max(after, job.after)
            total = tokens + job.item.row.length
            if (len(jobs) + 1) * length - total > padding:
                break
            if not fits(len(jobs) + 1, length, after=follow if first.keeps else None):
                break
            jobs.append(job)
            tokens, longest, after = total, length, follow
        return jobs

    def _nearest(self, first: Job) -> Iterator[Job]:
        """Yield the jobs that may run with one, the nearest in length first."""
        key, length = self._keys[first], first.item.row.length
        place = bisect_left(self._alike, (key,))
        sides = range(place + 1, len(self._alike)), range(place - 1, -1, -1)

        def side(places: range) -> Iterator[Job]:
            for at in places:
                other, job = self._alike[at]
                if other[:2] != key[:2]:
                    return
                yield job

        return merge(*map(side, sides), key=lambda job: abs(job.item.row.length - length))
