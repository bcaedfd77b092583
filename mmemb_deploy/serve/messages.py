"""What a service sends to its engine, and what the engine tells it of that: plain values, for another process too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmemb_deploy.errors import MmembError
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.inputs.rows import Row
from mmemb_deploy.options import Options
from mmemb_deploy.routing.items import Outcome
from mmemb_deploy.routing.router import Policy


@dataclass(frozen=True)
class Order:
    """The inputs of a request as rows, and what is asked for all of them."""

    number: int
    rows: Sequence[tuple[int, Row, list[int] | None]]  # with its index, and its rationale where the caller wrote one
    options: Options
    policy: Policy
    priority: int
    deadline: float  # by time.monotonic, which the processes of a machine share
    on_overload: str  # as of an Ask
    watched: bool  # whether scores and tokens are told too


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for an order any more."""

    number: int


@dataclass(frozen=True)
class Abandon:
    """All orders are to end with an error."""

    error: MmembError


Message = Order | Cancel | Abandon


@dataclass(frozen=True)
class Found:
    """A prompt has run: the gate's score, NaN without a gate, and the direct embedding (D,), L2-normalised."""

    score: float
    embedding_D: Floats


@dataclass(frozen=True)
class End:
    """An order is over: by an error, or with what was found of each of its inputs."""

    error: MmembError | None
    outcomes: Sequence[Outcome] = ()


Told = Found | list[int] | End  # a list has the token ids of a rationale so far


@dataclass(frozen=True)
class State:
    """How the engine stands."""

    threshold: float | None  # gate score from which an input reasons now, None without a gate
    backlog_seconds: float  # of work before it, by what runs have cost
    engine_seconds: float  # in which it has run
    figures: Mapping[str, float]  # by the names of `mmemb_deploy.serve.metrics.FIGURES`


@dataclass(frozen=True)
class Report:
    """What an engine tells at once: of orders, by their numbers; or that it can run no more, and why."""

    told: Sequence[tuple[int, Told]] = ()
    state: State | None = None
    defect: str | None = None


class Runner(Protocol):
    """A worker, wherever it runs, as the service's event loop sees it."""

    async def start(self, heard: Callable[[Report], None]) -> None:
        """Begin; `heard` is called in the event loop, first once everything has run once."""
        ...

    def send(self, message: Message) -> None:
        """Let the worker take a message before its next run."""
        ...

    async def stop(self) -> None:
        """End after the run at hand, and wait for that."""
        ...
