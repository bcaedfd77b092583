"""What a fleet does: more replicas at the same load for each, a surge, deaths; and whether one replica really does so.

Everything that is not called real is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.simulation.fleet import ROUTERS, Fleet, Request, Router, Scaling, Service, Traffic
from mmemb_benchmarks.simulation.measured import CostTable, measure_costs, measure_inputs
from mmemb_benchmarks.simulation.real import scheduled, served
from mmemb_benchmarks.workload import Workload
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import Pair

FEWEST = 3000  # requests of a point
SETTLING = 0.2  # of the requests, the first, whose latency does not count
CALM, SURGE = 15.0, 15.0  # seconds before a surge and after it, and of it
FOLD = 3.0  # times the traffic, in a surge
SURGED, DYING = 2, 10  # replicas
ELASTIC = Scaling(least=SURGED, most=4 * SURGED, startup=5.0, look_back=5.0, up_delay=2.0, down_delay=10.0)


class Point(BaseModel, frozen=True):
    """What became of requests; shares are of those answered, latency is from the arrival."""

    replicas: int
    rate_per_s: float
    requests: int
    p50_ms: float
    p95_ms: float
    reasoned: float
    degraded: float  # share that load kept from reasoning
    utilisation: float | None = None
    refused: int = 0
    retried: int = 0
    lost: int = 0


class Second(BaseModel, frozen=True):
    """A second of a surge: of the requests that arrived in it, and at its end."""

    second: int
    rate_per_s: float
    replicas: int
    queued_seconds: float
    p95_ms: float
    reasoned: float


class Validation(BaseModel, frozen=True):
    """The same arrivals at one replica, for real and simulated; ratios are simulated over real.

    `scheduled` is the real scheduler over the real engine, one thread that no other keeps waiting; `served` the whole
    service by the wall clock, whatever else this machine did.
    """

    load: float
    simulated: Point
    scheduled: Point
    served: Point
    to_scheduled: dict[str, float]
    to_served: dict[str, float]


class SimulationResult(BaseModel, frozen=True):
    """`mmemb bench simulate`. `capacity_per_s` is of one replica in full batches; a load is a share of it."""

    simulated: bool = True
    source: str
    inputs: int
    costs: CostTable
    capacity_per_s: float
    load: float
    validation: list[Validation]
    weak_scaling: dict[str, list[Point]]  # by router
    surge: dict[str, list[Second]]  # with the autoscaler, and without
    deaths: Point


def simulate(
    embedder: Embedder,
    workload: Workload,
    *,
    sizes: Sequence[int],
    load: float,
    validated: Sequence[float],
    seconds: float,
    seed: int,
    report: Callable[[str], None],
) -> SimulationResult:
    """Measure one replica, hold the simulation against it at some loads, then simulate fleets."""
    report("measuring inputs and costs")
    inputs = measure_inputs(embedder, workload.pairs)
    manifest = embedder.manifest
    assert manifest.gate is not None
    table = measure_costs(embedder, workload.pairs, seed)
    service = Service(
        inputs=inputs,
        costs=table.costs,
        threshold=manifest.gate.threshold,
        curve=manifest.gate.curve,
        max_tokens=manifest.model.max_rationale_tokens,
        tokens=manifest.batch.tokens,
        request=table.request,
    )
    capacity = _capacity(service)
    validation: list[Validation] = []
    for share in validated:
        report(f"real and simulated: one replica at {share:.0%} of {capacity:.0f} a second")
        traffic = Traffic.poisson([(capacity * share, seconds)], len(inputs), seed)
        validation.append(_validate(embedder, workload.pairs, service, traffic, share))
    weak: dict[str, list[Point]] = {}
    for size in sizes:
        rate = load * capacity * size
        traffic = Traffic.poisson([(rate, max(1.0, FEWEST / rate))], len(inputs), seed)
        for router in ROUTERS:
            report(f"simulated: {size} replicas, {router}")
            weak.setdefault(router, []).append(_point(service, size, traffic, router=router, seed=seed))
    rate = load * capacity * SURGED
    surge = Traffic.poisson([(rate, CALM), (FOLD * rate, SURGE), (rate, CALM)], len(inputs), seed)
    report("simulated: a surge")
    surges = {
        name: _surge(service, surge, scaling, seed)
        for name, scaling in (("autoscaled", ELASTIC), ("fixed", replace(ELASTIC, most=SURGED)))
    }
    report("simulated: deaths")
    traffic = Traffic.poisson([(load * capacity * DYING, 10.0)], len(inputs), seed)
    return SimulationResult(
        source=workload.source,
        inputs=len(inputs),
        costs=table,
        capacity_per_s=capacity,
        load=load,
        validation=validation,
        weak_scaling=weak,
        surge=surges,
        deaths=_point(service, DYING, traffic, router="seconds", deaths=(2.0, 4.0, 6.0), seed=seed),
    )


def _capacity(service: Service, requests: int = 2000) -> float:
    """Return requests a second of a replica that has them all at once, and lets as many reason as its gate wants."""
    traffic = Traffic(times=[0.0] * requests, numbers=[number % len(service.inputs) for number in range(requests)])
    done = Fleet(replace(service, gated_by_load=False), 1).run(traffic)
    return requests / max(request.ended for request in done)


def _point(
    service: Service, replicas: int, traffic: Traffic, *, router: Router, seed: int, deaths: Sequence[float] = ()
) -> Point:
    fleet = Fleet(service, replicas, router=router, deaths=deaths, startup=ELASTIC.startup, seed=seed)
    return _of(fleet.run(traffic), replicas, utilisation=fleet.utilisation())


def _of(requests: Sequence[Request], replicas: int, *, utilisation: float | None = None) -> Point:
    answered = [each for each in requests if each.endings and not each.refused]
    p50, p95 = np.percentile([each.seconds for each in answered[int(SETTLING * len(answered)) :]], (50, 95))
    return Point(
        replicas=replicas,
        rate_per_s=len(requests) / requests[-1].arrived,
        requests=len(requests),
        p50_ms=1000 * p50,
        p95_ms=1000 * p95,
        reasoned=float(np.mean([each.reasoned for each in answered])),
        degraded=float(np.mean([each.degraded for each in answered])),
        utilisation=utilisation,
        refused=sum(each.refused for each in requests),
        retried=sum(each.tries > 1 for each in requests),
        lost=sum(each.endings != 1 for each in requests),
    )


def _surge(service: Service, traffic: Traffic, scaling: Scaling, seed: int) -> list[Second]:
    fleet = Fleet(service, scaling.least, scaling=scaling, seed=seed)
    requests = fleet.run(traffic)
    seconds: list[Second] = []
    for when, replicas, queued in fleet.looks:
        of_it = [each for each in requests if when - 1 <= each.arrived < when]
        if of_it:
            seconds.append(
                Second(
                    second=round(when),
                    rate_per_s=len(of_it),
                    replicas=replicas,
                    queued_seconds=queued,
                    p95_ms=1000 * float(np.percentile([each.seconds for each in of_it], 95)),
                    reasoned=float(np.mean([each.reasoned for each in of_it])),
                )
            )
    return seconds


def _validate(embedder: Embedder, pairs: Sequence[Pair], service: Service, traffic: Traffic, load: float) -> Validation:
    by_scheduler = _of(scheduled(embedder, pairs, traffic)[0], 1)
    by_service = _of(served(embedder, pairs, traffic), 1)
    alone = replace(service, request=0.0)
    simulated = _point(service, 1, traffic, router="seconds", seed=0)
    return Validation(
        load=load,
        simulated=simulated,
        scheduled=by_scheduler,
        served=by_service,
        to_scheduled=_ratio(_point(alone, 1, traffic, router="seconds", seed=0), by_scheduler),
        to_served=_ratio(simulated, by_service),
    )


def _ratio(simulated: Point, real: Point) -> dict[str, float]:
    return {name: getattr(simulated, name) / getattr(real, name) for name in ("p50_ms", "p95_ms", "reasoned")}
