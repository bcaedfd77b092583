"""Latency, frontier and load compare the modes on the same requests and count what they did. No time is asserted."""

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest

from mmemb_benchmarks.measure import ceiling as ceilings
from mmemb_benchmarks.measure import load as loads
from mmemb_benchmarks.measure.ceiling import Ceiling, cpu_ceiling, gpu_ceiling
from mmemb_benchmarks.measure.frontier import frontier, measure_frontier
from mmemb_benchmarks.measure.latency import measure_latency, mode_options
from mmemb_benchmarks.measure.load import Search, Trial, measure_load, run_trial
from mmemb_benchmarks.timing import STAGES, Spent, timed_engine
from mmemb_benchmarks.workload import Workload, assemble, load_uncached
from mmemb_deploy import BackendError, Embedder, OptionError
from mmemb_deploy.bundle.work import graph_work
from mmemb_deploy.evaluation.pairs import encode_queries
from mmemb_deploy.evaluation.routes import Outcome, Routes
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.routing.router import Route

MODES = "never", "auto", "always"


def silent(_: str) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def nano() -> Embedder:
    return assemble(*load_uncached(None, "auto", 1))


@pytest.fixture(scope="module")
def traffic(nano: Embedder) -> Workload:
    return Workload.of(nano, queries=24, seed=0)


def test_modes_are_measured_on_the_same_requests_and_judged(traffic: Workload) -> None:
    opened, engine = load_uncached(None, "auto", 1)
    spent: Spent = defaultdict(float)
    embedder = assemble(opened, timed_engine(engine, spent))
    found = measure_latency(
        embedder,
        spent,
        traffic,
        mode_options(None, 8),
        ceiling=Ceiling(copy_gb_per_s=1, matmul_gflop_per_s=1, matmul_type="float32"),
        work={name: graph_work(opened, name) for name in ("embedder", "generator")},
        rounds=2,
        batch_size=8,
        joules=None,
        report=silent,
    )
    never, auto, always = (found.modes[name] for name in MODES)
    assert (never.reasoning_rate, always.reasoning_rate) == (0, 1)
    assert 0 < auto.reasoning_rate < 1
    assert 0 == never.rationale_tokens < auto.rationale_tokens < always.rationale_tokens <= 8
    for mode in (never, auto, always):
        assert 0 < mode.p50_ms_spread[0] <= mode.p50_ms <= mode.p95_ms <= mode.p99_ms
        assert sum(mode.stages_ms.values()) == pytest.approx(mode.mean_ms)
        assert set(mode.stages_ms) == set(STAGES)
        assert mode.stages_ms["prefill"] > 0
        assert mode.hit_at_1 is not None
        assert mode.hit_at_1 > 0.4
        assert mode.joules_per_request is None
    assert never.stages_ms["decode"] == 0 < always.stages_ms["decode"]
    assert found.ceiling.decode_share > 0 < found.ceiling.prefill_share


def test_a_timed_engine_answers_as_the_plain_one(traffic: Workload, nano: Embedder) -> None:
    opened, engine = load_uncached(None, "auto", 1)
    embedder = assemble(opened, timed_engine(engine, defaultdict(float)))
    inputs = [pair.query for pair in traffic.pairs]
    for mode in ("never", "always"):
        np.testing.assert_array_equal(embedder.encode(inputs, reasoning=mode), nano.encode(inputs, reasoning=mode))


def test_a_repeated_image_is_encoded_every_time(traffic: Workload) -> None:
    """Features that are remembered would make the second mode look faster than the first."""
    opened, engine = load_uncached(None, "auto", 1)
    spent: Spent = defaultdict(float)
    embedder = assemble(opened, timed_engine(engine, spent))
    image = next(pair.query for pair in traffic.pairs if "image" in pair.query)
    for _ in range(2):
        spent.clear()
        embedder.encode([image], reasoning="never")
        assert spent["vision"] > 0


@pytest.mark.parametrize(("precision", "product"), [("float32", "float32"), ("int4", "int8"), ("bfloat16", "float32")])
def test_a_ceiling_is_measured_in_the_type_that_multiplies(
    precision: str, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "SIDE", 64)
    monkeypatch.setattr(ceilings, "COPIED", 2**16)
    found = cpu_ceiling(precision, 1)
    assert found.matmul_type == product
    assert found.copy_gb_per_s > 0 < found.matmul_gflop_per_s


def test_a_gpu_keeps_nothing_of_its_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps would lie beside the engine that is measured next."""
    alive: WeakSet[Any] = WeakSet()
    kept: list[int] = []

    class Tensor:
        def __init__(self, *_: int, **__: Any) -> None:
            alive.add(self)

        def __matmul__(self, other: "Tensor") -> "Tensor":
            return Tensor()

        def copy_(self, _: "Tensor") -> "Tensor":
            return self

    cuda = SimpleNamespace(
        is_available=lambda: True, synchronize=lambda _: None, empty_cache=lambda: kept.append(len(alive))
    )
    torch = SimpleNamespace(randn=Tensor, empty=Tensor, bfloat16=None, uint8=None, cuda=cuda)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert gpu_ceiling().matmul_type == "bfloat16"
    assert kept == [0]


@pytest.mark.no_gpu
def test_a_torch_for_cpus_is_said_before_anything_is_measured() -> None:
    with pytest.raises(BackendError, match=r"torch .* does not run on a GPU here: install its build for CUDA"):
        gpu_ceiling()


def outcome(hits: list[float], milliseconds: list[float], tokens: list[float]) -> Outcome:
    scores_Q = np.array([0.2, 0.9, 0.4, 0.1])
    return Outcome(np.array(hits), np.zeros(4), np.array(tokens), scores_Q, np.array(milliseconds) / 1000)


ROUTES = Routes(outcome([1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]), outcome([1, 1, 0, 0], [5, 5, 5, 9], [8, 8, 8, 16]))


def test_the_frontier_lies_between_chance_and_hindsight() -> None:
    found = frontier(ROUTES, 0.5, "four pairs")
    gate = found.default
    figures = gate.reasoning_rate, gate.hit_at_1, gate.latency_ms, gate.rationale_tokens
    assert figures == pytest.approx((0.25, 0.75, 2.0, 2.0))
    drawn = next(point for point in found.random if point.reasoning_rate == 0.25)
    assert (drawn.hit_at_1, drawn.latency_ms, drawn.rationale_tokens) == pytest.approx((0.5, 2.25, 2.5))
    best = {point.reasoning_rate: point.hit_at_1 for point in found.oracle}
    assert best == {0: 0.5, 0.25: 0.75, 0.5: 0.75, 0.75: 0.75, 1: 0.5}


def test_the_frontier_names_the_default_and_each_rate_once() -> None:
    found = frontier(ROUTES, 0.5, "four pairs")
    assert found.default.reasoning_rate == 0.25
    assert [point.reasoning_rate for point in found.curve] == [0, 0.25, 0.5, 0.75, 1]
    assert found.random[0].hit_at_1 == found.oracle[0].hit_at_1 == 0.5
    assert found.always_hit_at_1 == 0.5


def test_the_frontier_is_that_of_the_embedder(nano: Embedder, traffic: Workload) -> None:
    found = measure_frontier(nano, traffic)
    assert (found.pairs, found.threshold) == (24, nano.manifest.gate and nano.manifest.gate.threshold)
    details = encode_queries(nano, traffic.pairs, reasoning="auto").details
    assert found.default.reasoning_rate == np.mean([detail.route is Route.REASON for detail in details])
    assert found.default.rationale_tokens == np.mean([detail.rationale_tokens for detail in details])
    assert found.always_hit_at_1 > found.random[0].hit_at_1
    assert 0 < found.curve[0].latency_ms < found.curve[-1].latency_ms
    unjudged = Workload(traffic.pairs, False, "requests.jsonl")
    with pytest.raises(OptionError, match=r"requests\.jsonl says nothing about quality"):
        measure_frontier(nano, unjudged)


def trial(rate: float, *, held: bool, half_held: bool = True) -> Trial:
    return Trial(
        rate_per_s=rate,
        p50_ms=1,
        p95_ms=1,
        p99_ms=1,
        completed_per_s=rate,
        mean_batch=1,
        held=held,
        half_held=half_held,
    )


def test_a_search_rises_until_a_rate_breaks_twice_and_then_halves() -> None:
    search = Search(capacity=100)
    rates = []
    while not search.done:
        rates.append(search.next_rate())
        search.add(trial(rates[-1], held=rates[-1] < 80))
    assert rates[:5] == pytest.approx([50, 70, 98, 98, 84])
    assert search.held < 80 <= search.broke < 1.05 * search.held


def test_a_rate_that_breaks_once_may_still_hold() -> None:
    search = Search(capacity=100)
    search.add(trial(50, held=False))
    assert search.next_rate() == 50
    search.add(trial(50, held=True))
    assert (search.held, search.broke) == (50, float("inf"))
    assert search.next_rate() == pytest.approx(70)


def test_a_rate_at_which_half_the_requests_are_late_is_not_tried_again() -> None:
    search = Search(capacity=100)
    search.add(trial(50, held=False, half_held=False))
    assert search.next_rate() == 25


def options(mode: str) -> EncodeOptions:
    return mode_options(None, 4)[mode]


def test_a_request_waits_from_its_arrival(nano: Embedder, traffic: Workload) -> None:
    """At a rate that nothing can serve, requests queue, batches fill, and the target breaks."""
    arguments: dict[str, Any] = {"seconds": 1e-4, "batch_size": 16, "seed": 0}
    flooded = run_trial(nano, traffic, options("never"), rate=1e6, target_ms=1e-3, **arguments)
    assert not flooded.held
    assert flooded.p95_ms > 1e-3
    calm = run_trial(nano, traffic, options("never"), rate=1e6, target_ms=1e6, **arguments)
    assert calm.held
    assert calm.mean_batch > 10


def test_load_reports_each_mode_and_what_it_sustains(
    nano: Embedder, traffic: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "TARGET", 1)  # a trial takes 20 times as long
    found = measure_load(
        nano,
        traffic,
        mode_options(None, 1),
        target_ms=None,
        seconds=0.01,
        trials=1,
        batch_size=8,
        seed=0,
        report=silent,
    )
    assert set(found.modes) == set(MODES)
    for mode in found.modes.values():
        (first,) = mode.trials
        assert mode.sustainable_per_s == (first.rate_per_s if first.held else 0)
    assert found.seconds == pytest.approx(20 * found.target_p95_ms / 1000)
    assert set(found.ratio) == {"never over always", "auto over always"}
