"""Latency, frontier and load compare the modes on the same requests and count what they did. No time is asserted."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemb_benchmarks.ceiling import Ceiling, cpu_ceiling, decoder_work
from mmemb_benchmarks.frontier import Routes, frontier, measure_routes
from mmemb_benchmarks.latency import measure_latency, mode_options, summarise
from mmemb_benchmarks.load import Search, Trial, measure_load, run_trial
from mmemb_benchmarks.stages import STAGES, Spent, timed_engine
from mmemb_benchmarks.traffic import Traffic, assemble, choose_traffic, load_forgetful, prompt_tokens, threshold_of_rate
from mmemb_deploy import Embedder, OptionError
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.evaluation.pairs import Judge, encode_queries
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.routing.router import Route

MODES = "never", "auto", "always"


def silent(_: str) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return choose_traffic(Bundle.open(NANO), queries=24, seed=0)


@pytest.fixture(scope="module")
def nano() -> Embedder:
    return assemble(*load_forgetful(None, "auto", 1))


def test_modes_are_measured_on_the_same_requests_and_judged(traffic: Traffic) -> None:
    opened, engine = load_forgetful(None, "auto", 1)
    spent: Spent = defaultdict(float)
    embedder = assemble(opened, timed_engine(engine, spent))
    modes = measure_latency(
        embedder, spent, traffic, mode_options(None, 8), rounds=2, batch_size=8, meter=None, report=silent
    )
    work = {name: decoder_work(opened, name) for name in ("embedder", "generator")}
    found = summarise(
        modes, Judge(embedder, traffic.pairs), Ceiling(1e9, 1e9, "float32"), work, prompt_tokens(embedder, traffic)
    )
    never, auto, always = (found["modes"][name] for name in MODES)
    assert (never["reasoning_rate"], always["reasoning_rate"]) == (0, 1)
    assert 0 < auto["reasoning_rate"] < 1
    assert 0 == never["rationale_tokens"] < auto["rationale_tokens"] < always["rationale_tokens"] <= 8
    for mode in (never, auto, always):
        assert 0 < mode["p50_ms_spread"][0] <= mode["p50_ms"] <= mode["p95_ms"] <= mode["p99_ms"]
        assert sum(mode["stages_ms"].values()) == pytest.approx(mode["mean_ms"])
        assert set(mode["stages_ms"]) == set(STAGES)
        assert mode["stages_ms"]["prefill"] > 0
        assert mode["hit_at_1"] > 0.4
        assert mode["joules_per_request"] is None
    assert never["stages_ms"]["decode"] == 0 < always["stages_ms"]["decode"]
    assert found["ceiling"]["decode_share"] > 0 < found["ceiling"]["prefill_share"]


def test_a_timed_engine_answers_as_the_plain_one(traffic: Traffic, nano: Embedder) -> None:
    opened, engine = load_forgetful(None, "auto", 1)
    embedder = assemble(opened, timed_engine(engine, defaultdict(float)))
    inputs = [pair.query for pair in traffic.pairs]
    for mode in ("never", "always"):
        np.testing.assert_array_equal(embedder.encode(inputs, reasoning=mode), nano.encode(inputs, reasoning=mode))


def test_a_repeated_image_is_encoded_every_time(traffic: Traffic) -> None:
    """Features that are remembered would make the second mode look faster than the first."""
    opened, engine = load_forgetful(None, "auto", 1)
    spent: Spent = defaultdict(float)
    embedder = assemble(opened, timed_engine(engine, spent))
    image = next(pair.query for pair in traffic.pairs if "image" in pair.query)
    for _ in range(2):
        spent.clear()
        embedder.encode([image], reasoning="never")
        assert spent["vision"] > 0


def test_a_rate_becomes_the_threshold_that_sends_so_many_to_reasoning(nano: Embedder, traffic: Traffic) -> None:
    threshold = threshold_of_rate(nano, traffic, 0.5)
    assert threshold is not None
    details = encode_queries(nano, traffic.pairs, threshold=threshold, max_rationale_tokens=1).details
    assert np.mean([detail.route is Route.REASON for detail in details]) == pytest.approx(0.5, abs=0.1)
    assert threshold_of_rate(nano, traffic, None) is None


def test_requests_of_a_file_are_not_judged(tmp_path: Path) -> None:
    lines = tmp_path / "requests.jsonl"
    lines.write_text('"a text"\n{"text": "another"}\n')
    traffic = choose_traffic(Bundle.open(NANO), requests=lines, queries=1, seed=0)
    assert [pair.query for pair in traffic.pairs] == ["a text", {"text": "another"}]
    assert not traffic.judged
    with pytest.raises(OptionError, match="--requests and --pairs"):
        choose_traffic(Bundle.open(NANO), requests=lines, pairs=lines, queries=1, seed=0)


def test_requests_of_a_workload_are_of_its_kind(nano: Embedder) -> None:
    traffic = choose_traffic(Bundle.open(NANO), workload="long text", queries=3, seed=0)
    assert [length > 200 for length in prompt_tokens(nano, traffic)] == [True] * 3
    with pytest.raises(OptionError, match="long text"):
        choose_traffic(Bundle.open(NANO), workload="long texts", queries=3, seed=0)


def test_work_counts_every_linear_weight_once(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    text = json.loads((tiny_checkpoint / "config.json").read_text())["text_config"]
    hidden, inner, size = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    layer = hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    bundle = Bundle.open(tiny_bundle)
    embedder, generator = (decoder_work(bundle, name) for name in ("embedder", "generator"))
    assert embedder.token_operations == generator.token_operations == 2 * layer * text["num_hidden_layers"]
    assert embedder.row_operations == 0
    assert generator.row_operations == 2 * hidden * text["vocab_size"]
    head = 4 * hidden * text["vocab_size"]
    assert generator.weight_bytes - embedder.weight_bytes == pytest.approx(head, abs=64)  # and a few constants


@pytest.mark.parametrize(("precision", "product"), [("float32", "float32"), ("int4", "int8"), ("bfloat16", "float32")])
def test_a_ceiling_is_measured_in_the_type_that_multiplies(precision: str, product: str) -> None:
    found = cpu_ceiling(precision, 1)
    assert found.product == product
    assert found.copy_bytes > 0 < found.operations


ROUTES = Routes(
    hits_2Q=np.array([[1, 0, 0, 1], [1, 1, 0, 0]], np.float64),
    milliseconds_2Q=np.array([[1, 1, 1, 1], [5, 5, 5, 9]], np.float64),
    tokens_Q=np.array([8, 8, 8, 16], np.float64),
    scores_Q=np.array([0.2, 0.9, 0.4, 0.1]),
)


def test_the_frontier_lies_between_chance_and_hindsight() -> None:
    gate = ROUTES.gate(0.5)
    assert (gate.reasoning_rate, gate.hit_at_1, gate.latency_ms, gate.rationale_tokens) == (0.25, 0.75, 2.0, 2.0)
    drawn = ROUTES.random(0.25)
    assert (drawn.hit_at_1, drawn.latency_ms, drawn.rationale_tokens) == (0.5, 2.25, 2.5)
    assert [ROUTES.oracle(rate).hit_at_1 for rate in (0, 0.25, 0.5, 0.75, 1)] == [0.5, 0.75, 0.75, 0.75, 0.5]


def test_the_frontier_names_the_default_and_each_rate_once() -> None:
    found = frontier(ROUTES, 0.5)
    assert found["default"]["reasoning_rate"] == 0.25
    assert [point["reasoning_rate"] for point in found["curve"]] == [0, 0.25, 0.5, 0.75, 1]
    assert found["random"][0]["hit_at_1"] == found["oracle"][0]["hit_at_1"] == 0.5


def test_routes_are_those_of_the_embedder(nano: Embedder, traffic: Traffic) -> None:
    routes = measure_routes(nano, traffic, silent)
    assert routes.hits_2Q.shape == routes.milliseconds_2Q.shape == (2, 24)
    details = encode_queries(nano, traffic.pairs, reasoning="never").details
    np.testing.assert_allclose(routes.scores_Q, [detail.gate_score for detail in details], atol=1e-5)
    assert routes.scores_Q.shape == routes.tokens_Q.shape == (24,)
    assert routes.hits_2Q[1].mean() > routes.hits_2Q[0].mean()
    unjudged = Traffic(traffic.pairs, False, "requests.jsonl")
    with pytest.raises(OptionError, match=r"requests\.jsonl says nothing about quality"):
        measure_routes(nano, unjudged, silent)


def trial(rate: float, *, held: bool, half_held: bool = True) -> Trial:
    return Trial(rate, 1, 1, 1, rate, 1, held, half_held)


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


def test_a_request_waits_from_its_arrival(nano: Embedder, traffic: Traffic) -> None:
    """At a rate that nothing can serve, requests queue, batches fill, and the target breaks."""
    arguments: dict[str, Any] = {"seconds": 0.01, "batch_size": 16, "seed": 0}
    flooded = run_trial(nano, traffic, options("never"), rate=1e6, target_ms=1e-3, **arguments)
    assert not flooded.held
    assert flooded.p95_ms > 1e-3
    calm = run_trial(nano, traffic, options("never"), rate=1e6, target_ms=1e6, **arguments)
    assert calm.held
    assert calm.mean_batch > 10


def test_load_reports_each_mode_and_what_it_sustains(nano: Embedder, traffic: Traffic) -> None:
    found = measure_load(
        nano,
        traffic,
        mode_options(None, 4),
        target_ms=None,
        seconds=0.01,
        trials=1,
        batch_size=8,
        seed=0,
        report=silent,
    )
    assert set(found["modes"]) == set(MODES)
    for mode in found["modes"].values():
        (first,) = mode["trials"]
        assert mode["sustainable_per_s"] == (first["rate_per_s"] if first["held"] else 0)
    assert found["seconds"] == pytest.approx(20 * found["target_p95_ms"] / 1000)
    assert set(found["ratio"]) == {"never over always", "auto over always"}
