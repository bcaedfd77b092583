"""Many replicas, each with the server's own scheduler on a time line of its own, behind one router.

Replicas meet only where the router, the autoscaler or a death looks at them: each is run up to then, and no further. So
a thousand take little more than the work that they do. All of it is simulated; what is real are the scheduler, the
load gate, the autoscaler's rule, and the costs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Literal

import numpy as np

from mmemb_benchmarks.simulation.engine import SimulatedCosts, SimulatedEngine, SimulatedInput
from mmemb_deploy.bundle.manifest import CurvePoint
from mmemb_deploy.errors import OverloadError
from mmemb_deploy.inputs.rows import Row
from mmemb_deploy.routing.items import Item
from mmemb_deploy.routing.jobs import Call, Job, Pace
from mmemb_deploy.routing.load import LoadGate
from mmemb_deploy.routing.router import Policy
from mmemb_deploy.routing.scheduler import Scheduler
from mmemb_deploy.serve.scaling import BUSY, QUEUED, ScaleByWork

Router = Literal["seconds", "requests", "round robin"]
ROUTERS: tuple[Router, ...] = ("seconds", "requests", "round robin")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What comes: when, in seconds, the times rising, and which of the inputs."""

    times: Sequence[float]
    numbers: Sequence[int]

    @classmethod
    def poisson(cls, rates: Sequence[tuple[float, float]], inputs: int, seed: int) -> Traffic:
        """Draw arrivals at rates a second, each for so many seconds; traffic of one seed has the same inputs."""
        gaps, kinds = (np.random.default_rng([seed, part]) for part in range(2))
        times: list[float] = []
        began = 0.0
        for rate, seconds in rates:
            now = began + gaps.exponential(1 / rate)
            while now < began + seconds:
                times.append(now)
                now += gaps.exponential(1 / rate)
            began += seconds
        return cls(times=times, numbers=kinds.integers(inputs, size=len(times)).tolist())


@dataclass(eq=False)
class Request:
    """One input on its way, and what became of it."""

    number: int
    arrived: float
    ended: float = math.nan
    reasoned: bool = False
    degraded: bool = False
    refused: bool = False
    endings: int = 0  # that a client saw: one, in the end
    tries: int = 0

    @property
    def seconds(self) -> float:
        """From its arrival at the router to its answer."""
        return self.ended - self.arrived


@dataclass(frozen=True, kw_only=True)
class Service:
    """What every replica is: its inputs and costs, and the server's settings."""

    inputs: Sequence[SimulatedInput]
    costs: Callable[[int], SimulatedCosts]  # of a fleet with this seed
    threshold: float
    curve: Sequence[CurvePoint] = ()
    max_tokens: int
    tokens: int = 8192  # of prompts that run together
    request: float = 0.0  # seconds of a request outside of the scheduler
    batch_size: int = 32
    patience: float = 0.5
    gated_by_load: bool = True


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """When replicas come and go, as Ray Serve's autoscaler decides."""

    least: int
    most: int
    startup: float  # seconds until a new replica answers
    every: float = 1.0  # seconds between two looks
    look_back: float = 20.0
    up_delay: float = 5.0
    down_delay: float = 120.0
    policy: ScaleByWork = field(default_factory=ScaleByWork)


class Replica:
    """A scheduler over a simulated engine, and the requests that it has."""

    def __init__(self, service: Service, costs: SimulatedCosts, rows: Sequence[Row], began: float) -> None:
        self.began = began
        self.ended: float | None = None
        self.engine = SimulatedEngine(service.inputs, costs, tokens=service.tokens)
        self.engine.clock.now = began
        load = LoadGate(service.curve, patience=service.patience) if service.gated_by_load else None
        pace = Pace(prompts=service.batch_size, rationales=service.batch_size, patient=False)
        self.scheduler = Scheduler(self.engine.paths, pace, self.engine.clock, load=load)
        self.held: dict[Job, Request] = {}
        self._service, self._rows, self._told = service, rows, 0.0
        self._done: list[tuple[float, Job]] = []  # which a client has not seen yet

    @property
    def ran(self) -> float:
        """Seconds in which its engine has run."""
        return self.scheduler.ran

    def catch_up(self, now: float) -> None:
        """Run what begins before `now`; what has ended by then is answered."""
        clock = self.engine.clock
        while clock.now < now and self.scheduler.advance():
            pass
        if now < math.inf:
            clock.now = max(clock.now, now)
        late = []
        for when, job in self._done:
            if when > now:
                late.append((when, job))
            else:
                self._answer(when, job)
        self._done = late

    def _answer(self, when: float, job: Job) -> None:
        request, item = self.held.pop(job), job.item
        request.ended, request.endings = when + self._service.request, request.endings + 1
        request.reasoned, request.degraded = item.reasoned is not None, item.degraded_by is not None

    def die(self, now: float) -> list[Request]:
        """End, and return the requests that it has not answered by now."""
        self.catch_up(now)
        lost = list(self.held.values())
        self.held, self._done, self.ended, self.engine.clock.now = {}, [], now, math.inf
        return lost

    def backlog(self, now: float) -> float:
        """Return the seconds of work before it, the run at hand included."""
        return max(self.engine.clock.now - now, 0.0) + self.scheduler.backlog_seconds

    def busy(self, seconds: float) -> float:
        """Return the share of the last seconds in which its engine ran, and begin anew."""
        share = (self.ran - self._told) / seconds
        self._told = self.ran
        return share

    def submit(self, request: Request) -> None:
        """Take a request, which its answer or a death ends; refuse it where it does not fit."""
        request.tries += 1
        service = self._service
        job = Job(
            Item(request.number, self._rows[request.number], 0.0),
            Policy("auto", service.threshold),
            service.max_tokens,
            Call(),
            yields=True,
            ended=lambda job: self._done.append((self.engine.clock.now, job)),
        )
        try:
            self.scheduler.submit([job])
        except OverloadError:
            request.refused, request.ended, request.endings = True, self.engine.clock.now, request.endings + 1
        else:
            self.held[job] = request


class Fleet:
    """Replicas, a router, an autoscaler where there is one, and deaths."""

    def __init__(
        self,
        service: Service,
        replicas: int,
        *,
        router: Router = "seconds",
        scaling: Scaling | None = None,
        deaths: Sequence[float] = (),
        startup: float = 10.0,
        seed: int = 0,
    ) -> None:
        """Of `deaths`, each ends one replica at random at that second; another takes its place after `startup`."""
        self.replicas: list[Replica] = []  # that answer
        self.gone: list[Replica] = []
        self.target = replicas
        self.looks: list[tuple[float, int, float]] = []  # when, replicas, and seconds of work that wait
        self._service, self._router, self._scaling = service, router, scaling
        self._costs = service.costs(seed)
        self._startup = startup if scaling is None else scaling.startup
        self._rng = np.random.default_rng([seed, 2])
        self._rows = [each.row(number) for number, each in enumerate(service.inputs)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order, self._turn = count(), count()
        self._waiting: list[Request] = []  # while no replica is there
        self._starting = 0
        self._told: deque[tuple[float, float, float]] = deque()  # when, seconds queued and engines busy, of all
        self._differs: float | None = None  # since when another number of replicas is wanted
        for _ in range(replicas):
            self.replicas.append(Replica(service, self._costs, self._rows, 0.0))
        for when in deaths:
            self._at(when, self._die)

    def run(self, traffic: Traffic) -> list[Request]:
        """Let traffic come, and return what became of every request once all have ended."""
        requests = [Request(number, when) for when, number in zip(traffic.times, traffic.numbers, strict=True)]
        for request in requests:
            self._at(request.arrived, partial(self._route, request))
        last = requests[-1].arrived if requests else 0.0
        if self._scaling is not None:
            self._at(self._scaling.every, partial(self._look, self._scaling, last))
        while self._events:
            now, _, event = heappop(self._events)
            event(now)
        for replica in (*self.replicas, *self.gone):
            replica.catch_up(math.inf)
        return requests

    def utilisation(self) -> float:
        """Return the share of the time that engines ran while they were there, once `run` has returned."""
        every = (*self.replicas, *self.gone)
        until = max(each.engine.clock.now for each in self.replicas)
        return sum(each.ran for each in every) / sum((each.ended or until) - each.began for each in every)

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        heappush(self._events, (when, next(self._order), event))

    def _route(self, request: Request, now: float) -> None:
        if not self.replicas:
            self._waiting.append(request)
            return
        if self._router == "round robin":
            chosen = self.replicas[next(self._turn) % len(self.replicas)]
            chosen.catch_up(now)
        else:
            several = len(self.replicas) > 1
            places = self._rng.choice(len(self.replicas), 2, replace=False) if several else [0]
            two = [self.replicas[place] for place in places]
            for each in two:
                each.catch_up(now)
            chosen = min(two, key=lambda each: each.backlog(now) if self._router == "seconds" else len(each.held))
        chosen.submit(request)

    def _die(self, now: float) -> None:
        if not self.replicas:
            return
        dead = self.replicas.pop(int(self._rng.integers(len(self.replicas))))
        lost = dead.die(now)
        self.gone.append(dead)
        self._start(now)
        for request in lost:
            self._route(request, now)

    def _start(self, now: float) -> None:
        self._starting += 1
        self._at(now + self._startup, self._ready)

    def _ready(self, now: float) -> None:
        self._starting -= 1
        self.replicas.append(Replica(self._service, self._costs, self._rows, now))
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._route(request, now)

    def _look(self, scaling: Scaling, last: float, now: float) -> None:
        """Let the autoscaler see what its replicas tell, and act on what holds for its delay."""
        for replica in self.replicas:
            replica.catch_up(now)
        queued = sum(each.scheduler.backlog_seconds for each in self.replicas)
        self._told.append((now, queued, sum(each.busy(scaling.every) for each in self.replicas)))
        while self._told[0][0] <= now - scaling.look_back:
            self._told.popleft()
        mean = [sum(told[part] for told in self._told) / len(self._told) for part in (1, 2)]
        wanted = scaling.policy.replicas({QUEUED: {0: mean[0]}, BUSY: {0: mean[1]}})
        assert wanted is not None
        bounded = min(max(math.ceil(wanted), scaling.least), scaling.most)
        self._decide(bounded, now, scaling)
        self.looks.append((now, len(self.replicas), queued))
        if now < last:
            self._at(now + scaling.every, partial(self._look, scaling, last))

    def _decide(self, wanted: int, now: float, scaling: Scaling) -> None:
        if wanted == self.target:
            self._differs = None
            return
        self._differs = now if self._differs is None else self._differs
        if now - self._differs < (scaling.up_delay if wanted > self.target else scaling.down_delay):
            return
        self._differs, self.target = None, wanted
        for _ in range(wanted - len(self.replicas) - self._starting):
            self._start(now)
        while len(self.replicas) > max(wanted, 1):
            leaving = self.replicas.pop()  # it answers what it has
            leaving.ended = now
            self.gone.append(leaving)
