"""An open loop: requests are sent when they are due, whatever became of those before, and are timed from then on.

A closed loop, whose clients wait for answers before they ask again, hides what a queue does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.errors import DeadlineError, OverloadError
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.serve.ask import Ask

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """An embedding (D,), L2-normalised, and how it came about."""

    embedding_D: Floats
    reasoned: bool
    threshold: float | None  # that the gate's score was held against, None where nothing was
    degraded_by: str | None  # what took reasoning away: "load", "deadline" or "memory"


class Target(Protocol):
    """What requests of one input are sent to."""

    async def ask(self, ask: Ask) -> Answer:
        """Raises OverloadError where a request is refused, DeadlineError where the target itself says it is late."""
        ...


@dataclass(frozen=True)
class Reply:
    """What became of a request."""

    number: int  # of the request
    due: float  # seconds from the first moment
    seconds: float  # from when it was due to its end
    answer: Answer | None  # None where there is none
    refused: bool = False  # else, without an answer, it was late and said so
    lag: float = 0.0  # of the seconds, those before it was sent


class _HopelessError(Exception):
    """Somebody waited for so long that the rest need not be tried."""


def arrivals(rate: float, count: int, burst: float, rng: np.random.Generator) -> Seconds:
    """Return when requests are due, in seconds: a Poisson process, or bursts that are one.

    The mean is `rate` a second either way; `burst` requests come together in the mean, in a geometric distribution.
    Draws of one seed differ between rates only by their scale.
    """
    begins = rng.random(count) * burst < 1
    due: Seconds = np.cumsum(rng.exponential(burst / rate, count) * begins)
    return due


async def offer(target: Target, asks: Sequence[Ask], due: Sequence[float], *, give_up: float = math.inf) -> list[Reply]:
    """Send each request when it is due; return the replies as they came.

    Ends early, without the replies that were missing, once a request has waited for `give_up` seconds.
    """
    replies: list[Reply] = []
    began = time.perf_counter()

    async def send(number: int) -> None:
        answer, refused, lag = None, False, time.perf_counter() - began - due[number]
        try:
            answer = await target.ask(asks[number])
        except OverloadError:
            refused = True
        except DeadlineError:
            pass  # which a reply without an answer means
        seconds = time.perf_counter() - began - due[number]
        replies.append(Reply(number, due[number], seconds, answer, refused, lag))
        if seconds > give_up:
            raise _HopelessError

    try:
        async with asyncio.TaskGroup() as group:
            for number, at in enumerate(due):
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                group.create_task(send(number))
    except* _HopelessError:
        pass
    return replies
