"""One real replica: the scheduler over the engine by a clock of its own, or the whole service by the wall clock."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mmemb_benchmarks.simulation.fleet import Request, Traffic
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_deploy.preparer import Prepared
from mmemb_deploy.results import Detail
from mmemb_deploy.routing.costs import ByRows, Costs
from mmemb_deploy.routing.items import Item
from mmemb_deploy.routing.jobs import Job, Pace
from mmemb_deploy.routing.load import LoadGate
from mmemb_deploy.routing.router import Route
from mmemb_deploy.routing.scheduler import Scheduler
from mmemb_deploy.serve.ask import Ask
from mmemb_deploy.serve.service import Service

ALONE = 50  # requests by which the time outside of the scheduler is measured

Clock = Callable[[], float]


class Steps(ByRows):
    """Writes down the rows and seconds of every step."""

    def __init__(self, runs: list[tuple[int, float]]) -> None:
        super().__init__()
        self._runs = runs

    def add(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        super().add(rows, seconds)
        self._runs.append((rows, seconds))


@dataclass
class Seen(Costs):
    """What a scheduler learns of costs, and every run that it learnt from."""

    prompt_runs: list[tuple[int, int, float]] = field(default_factory=list)  # rows, tokens with padding, seconds
    step_runs: list[tuple[int, float]] = field(default_factory=list)  # rows, seconds
    between: float = 0.0  # seconds outside of runs, of all of them together

    def __post_init__(self) -> None:
        self.steps = Steps(self.step_runs)

    def prefilled(self, rows: int, tokens: int, seconds: float) -> None:
        """Learn from prompts."""
        super().prefilled(rows, tokens, seconds)
        self.prompt_runs.append((rows, tokens, seconds))


def clock_of(embedder: Embedder) -> Clock:
    """Return the clock that runs are timed by: a CPU's own seconds, whatever else runs there, or a GPU's by the wall.

    The former are right for an engine of one thread, the caller's.
    """
    return time.thread_time if embedder.backend.endswith("CPU") else time.perf_counter


def scheduled(
    embedder: Embedder, pairs: Sequence[Pair], traffic: Traffic, *, gated: bool = True
) -> tuple[list[Request], Seen]:
    """Run traffic by the scheduler over the engine, on a clock that skips what is idle; preprocessing is not counted.

    With `gated`, load raises the gate's threshold, as it does in the service.
    """
    clock, skipped = clock_of(embedder), 0.0

    def now() -> float:
        return clock() + skipped

    gate = embedder.manifest.gate
    load = LoadGate(gate.curve, patience=0.5) if gated and gate is not None else None
    scheduler = Scheduler(embedder.paths, Pace(patient=False), now, load=load)
    scheduler.costs = seen = Seen()
    prepared = [embedder.prepare([pair.query], instruction=pair.instruction) for pair in pairs]
    requests = [Request(number, when) for number, when in zip(traffic.numbers, traffic.times, strict=True)]
    jobs: dict[Job, Request] = {}

    def ended(job: Job) -> None:
        request = jobs.pop(job)
        request.ended, request.endings = now() - began, 1
        request.reasoned, request.degraded = job.item.reasoned is not None, job.item.degraded_by is not None

    worked = 0.0
    began, coming = now(), deque(requests)
    while coming or jobs:
        while coming and coming[0].arrived <= now() - began:
            request = coming.popleft()
            (job,) = embedder.jobs(_fresh(prepared[request.number]))
            job.ended, job.yields = ended, True
            jobs[job] = request
            scheduler.submit([job])
        entered = clock()
        if scheduler.advance():
            worked += clock() - entered
        elif coming:
            skipped += max(began + coming[0].arrived - now(), 0.0)
    seen.between = worked - sum(scheduler.seconds.values())
    return requests, seen


def _fresh(prepared: Prepared) -> Prepared:
    """Return the same inputs, not yet run."""
    return replace(prepared, items=[Item(item.index, item.row, item.preprocess) for item in prepared.items])


def served(embedder: Embedder, pairs: Sequence[Pair], traffic: Traffic) -> list[Request]:
    """Send traffic to a service in this process, by the wall clock."""

    async def run() -> list[Request]:
        service = Service.in_thread(embedder)
        await service.start()
        began = time.perf_counter()

        async def one(number: int, when: float) -> Request:
            await asyncio.sleep(began + when - time.perf_counter())
            detail = await _asked(service, pairs[number])
            request = Request(number, when, ended=time.perf_counter() - began, endings=1)
            request.reasoned, request.degraded = detail.route is Route.REASON, detail.degraded_by is not None
            return request

        sent = [one(number, when) for number, when in zip(traffic.numbers, traffic.times, strict=True)]
        requests = await asyncio.gather(*sent)
        await service.drain(1.0)
        return list(requests)

    return asyncio.run(run())


def request_seconds(embedder: Embedder, pairs: Sequence[Pair], between: float) -> float:
    """Return the seconds of a request that is alone which neither runs nor what lies `between` them take."""

    async def run() -> float:
        service = Service.in_thread(embedder)
        await service.start()
        outside: list[float] = []
        for pair in pairs[:ALONE]:
            ran, began = service.engine_seconds, time.perf_counter()
            detail = await _asked(service, pair)
            runs = 1 if detail.route is Route.FAST else 3 + detail.rationale_tokens
            outside.append(time.perf_counter() - began - (service.engine_seconds - ran) - runs * between)
        await service.drain(1.0)
        return max(statistics.median(outside), 0.0)

    return asyncio.run(run())


async def _asked(service: Service, pair: Pair) -> Detail:
    (detail,) = (await service.embed(Ask(inputs=[pair.query], options={"instruction": pair.instruction}))).details
    assert detail is not None
    return detail
