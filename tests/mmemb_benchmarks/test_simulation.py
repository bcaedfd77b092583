"""Simulated fleets: every request ends once, whoever dies; a seed decides everything; replicas come when needed."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmemb_benchmarks.simulation import measured, study
from mmemb_benchmarks.simulation.engine import SimulatedCosts, SimulatedInput
from mmemb_benchmarks.simulation.fleet import ROUTERS, Fleet, Request, Router, Scaling, Service, Traffic
from mmemb_benchmarks.simulation.measured import CostTable
from mmemb_deploy.cli.main import main

COSTS = SimulatedCosts(prompts=lambda rows, tokens: 0.002 + 1e-5 * rows * tokens, step=lambda rows: 0.001 + 1e-4 * rows)
INPUTS = [SimulatedInput(20 + number, number / 10, number) for number in range(10)]
SERVICE = Service(inputs=INPUTS, costs=lambda _: COSTS, threshold=0.7, max_tokens=20, gated_by_load=False)


def traffic(rate: float, seconds: float = 2.0, seed: int = 0) -> Traffic:
    return Traffic.poisson([(rate, seconds)], len(INPUTS), seed)


def outcome(requests: list[Request]) -> list[tuple[int, float, float, bool, int]]:
    return [(each.number, each.arrived, each.ended, each.reasoned, each.tries) for each in requests]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_ends_once_also_when_replicas_die(router: Router) -> None:
    fleet = Fleet(SERVICE, 3, router=router, deaths=(0.5, 0.6, 0.7, 1.5), startup=0.3, seed=1)
    requests = fleet.run(traffic(600))  # more than is done at once, so that there is something to lose
    assert {request.endings for request in requests} == {1}
    assert not any(request.refused for request in requests)
    assert any(request.tries > 1 for request in requests)
    assert all(request.ended > request.arrived for request in requests)
    assert [request.reasoned for request in requests] == [INPUTS[request.number].score >= 0.7 for request in requests]
    assert not any(replica.held for replica in (*fleet.replicas, *fleet.gone))


def test_requests_wait_while_no_replica_is_there() -> None:
    requests = Fleet(SERVICE, 1, deaths=(0.5,), startup=1.0).run(traffic(50))
    assert {request.endings for request in requests} == {1}
    waited = [request for request in requests if 0.5 <= request.arrived < 1.5]
    assert waited
    assert all(request.ended > 1.5 for request in waited)


def test_an_answer_that_its_replica_did_not_live_to_give_is_given_by_another() -> None:
    slow = replace(SERVICE, costs=lambda _: SimulatedCosts(prompts=lambda *_: 1.0, step=lambda _: 1.0))
    (request,) = Fleet(slow, 1, deaths=(0.5,), startup=0.0).run(Traffic(times=[0.0], numbers=[0]))
    assert (request.tries, request.endings, request.ended) == (2, 1, 1.5)


def test_one_seed_is_one_outcome_and_another_is_another() -> None:
    def run(seed: int) -> list[tuple[int, float, float, bool, int]]:
        return outcome(Fleet(SERVICE, 4, deaths=(0.4,), startup=0.5, seed=seed).run(traffic(400)))

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_a_fleet_does_the_same_whatever_ran_before_it() -> None:
    table = CostTable(
        prompt_run=0.01,
        prompt_row=0.001,
        prompt_token=0.0,
        step_run=0.002,
        step_row=0.001,
        prompt_spread=[0.5, 1.5],
        step_spread=[1.0, 2.0],
        between=0.0,
        request=0.0,
        runs=1,
    )
    service = replace(SERVICE, costs=table.costs)
    first, second = (outcome(Fleet(service, 2).run(traffic(50))) for _ in range(2))
    assert first == second


def test_one_replica_is_the_same_by_every_router() -> None:
    first, *others = (outcome(Fleet(SERVICE, 1, router=router).run(traffic(100))) for router in ROUTERS)
    assert all(other == first for other in others)


def test_a_surge_brings_replicas_and_its_end_takes_them_away_without_a_loss() -> None:
    scaling = Scaling(least=1, most=6, startup=0.5, every=0.25, look_back=0.5, up_delay=0.25, down_delay=0.5)
    fleet = Fleet(SERVICE, 1, scaling=scaling)
    requests = fleet.run(Traffic.poisson([(50, 1.0), (900, 2.0), (50, 4.0)], len(INPUTS), 0))
    counts = [replicas for _, replicas, _ in fleet.looks]
    assert max(counts) > 1
    assert counts[-1] < max(counts)
    assert max(counts) <= scaling.most
    assert {request.endings for request in requests} == {1}


def test_engines_are_busy_for_the_share_of_the_time_that_the_work_takes() -> None:
    never = replace(SERVICE, threshold=1.0, costs=lambda _: SimulatedCosts(lambda *_: 0.01, lambda _: 0.0))
    fleet = Fleet(never, 2, router="round robin")
    fleet.run(Traffic(times=np.arange(0, 1, 0.05).tolist(), numbers=[0] * 20))
    assert fleet.utilisation() == pytest.approx(20 * 0.01 / (2 * 0.96), rel=0.02)


def test_runs_take_what_was_fitted_and_differ_as_they_did() -> None:
    table = CostTable(
        prompt_run=0.01,
        prompt_row=0.001,
        prompt_token=0.0001,
        step_run=0.002,
        step_row=0.001,
        prompt_spread=[0.5, 1.5],
        step_spread=[1.0, 2.0],
        between=0.1,
        request=0.0,
        runs=1,
    )
    costs = table.costs(0)
    assert Counter(round(costs.prompts(2, 30), 6) for _ in range(50)).keys() == {0.109, 0.127}
    assert Counter(round(costs.step(4), 6) for _ in range(50)).keys() == {0.106, 0.112}


@pytest.mark.slow
def test_the_command_holds_a_simulation_against_a_real_replica_and_says_what_is_simulated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured, "SECONDS", 0.5)
    monkeypatch.setattr(study, "FEWEST", 200)
    monkeypatch.setattr(study, "CALM", 2.0)
    monkeypatch.setattr(study, "SURGE", 2.0)
    words = ["--queries=40", "--replicas=2", "--validate=0.2", "--seconds=1", "--load=0.2", "--json"]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "simulate", *words])
    written = json.loads(capsys.readouterr().out)
    found = study.SimulationResult.model_validate(written["result"])
    assert written["kind"] == "simulation"
    assert found.simulated
    (checked,) = found.validation
    assert checked.simulated.requests == checked.scheduled.requests == checked.served.requests
    assert checked.to_served["reasoned"] == checked.simulated.reasoned / checked.served.reasoned
    assert [point.replicas for points in found.weak_scaling.values() for point in points] == [2, 2, 2]
    assert (found.deaths.lost, found.deaths.refused) == (0, 0)
    assert 0 <= found.deaths.retried < found.deaths.requests  # none where all three died idle
