"""The modes and controls are what their names say."""

import numpy as np
import pytest

from mmemb_deploy import Embedder
from mmemb_deploy.evaluation.controls import MODES, compare_modes, run_digitchain
from mmemb_deploy.evaluation.digitchain import FAMILIES, DigitChain
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_deploy.evaluation.routes import Outcome, Routes


@pytest.fixture(scope="module")
def outcomes(tiny_embedder: Embedder) -> dict[str, Outcome]:
    """Every mode on 20 pairs of mixed traffic; a random model, so that only the plumbing is judged."""
    pairs = [Pair.of(example) for example in DigitChain("test", 0).mixed(20)]
    return compare_modes(tiny_embedder, pairs, seed=0, timed=3)


def test_rates_and_tokens_follow_the_mode(outcomes: dict[str, Outcome]) -> None:
    assert tuple(outcomes) == MODES
    assert not outcomes["never"].reasoned_Q.any()
    assert not outcomes["never"].tokens_Q.any()
    for mode in ("always", "shuffled_rationale", "empty_rationale"):
        assert outcomes[mode].reasoned_Q.all()
    assert outcomes["always"].tokens_Q.any()
    assert not outcomes["empty_rationale"].tokens_Q.any()
    assert outcomes["random_gate"].reasoned_Q.sum() == outcomes["auto"].reasoned_Q.sum()


def test_auto_is_never_and_always_put_together(outcomes: dict[str, Outcome]) -> None:
    auto = outcomes["auto"]
    routed = Routes(outcomes["never"], outcomes["always"]).at(auto.reasoned_Q)
    np.testing.assert_array_equal(auto.hits_Q, routed.hits_Q)
    np.testing.assert_array_equal(auto.tokens_Q, routed.tokens_Q)


def test_the_oracle_reasons_where_reasoning_saves_a_miss(outcomes: dict[str, Outcome]) -> None:
    oracle, never, always = (outcomes[mode] for mode in ("oracle_gate", "never", "always"))
    np.testing.assert_array_equal(oracle.hits_Q, np.maximum(never.hits_Q, always.hits_Q))
    np.testing.assert_array_equal(oracle.reasoned_Q, always.hits_Q > never.hits_Q)


def test_every_mode_is_timed_on_the_same_pairs(outcomes: dict[str, Outcome]) -> None:
    for outcome in outcomes.values():
        assert np.isnan(outcome.seconds_Q).tolist() == [False] * 3 + [True] * 17


def test_the_report_has_every_family_mode_and_figure(tiny_embedder: Embedder) -> None:
    figures = run_digitchain(tiny_embedder, seed=1, queries=4, report=lambda _: None)
    assert tuple(figures["families"]) == FAMILIES
    assert all(tuple(hits) == MODES for hits in figures["families"].values())
    assert tuple(figures["mixed"]) == MODES
    assert list(figures["mixed"]["auto"]) == ["hit_at_1", "rationale_tokens", "reasoning_rate", "p50_ms"]
