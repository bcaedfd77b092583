"""The embedded bundle shows what it is there to show, on digits and questions that nothing was tuned on."""

from typing import Any

import pytest

from mmemb_deploy import Embedder
from mmemb_deploy.evaluation.controls import run_digitchain

CHAINS = ("chain-2", "chain-3", "chain-4", "chain-5")


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """`mmemb bench digitchain --seed 20260 --queries 100`."""
    return run_digitchain(Embedder.load(), seed=20260, queries=100, report=lambda _: None, timed=0)


def test_a_name_needs_no_reasoning(figures: dict[str, Any]) -> None:
    assert figures["families"]["name"]["never"] >= 0.97


@pytest.mark.parametrize("family", CHAINS)
def test_a_chain_needs_reasoning_and_auto_gives_it(figures: dict[str, Any], family: str) -> None:
    hits = figures["families"][family]
    assert hits["always"] >= 0.9
    assert hits["auto"] >= hits["always"] - 0.01
    assert hits["never"] <= hits["always"] - 0.3


@pytest.mark.parametrize("family", CHAINS[1:])
def test_what_a_rationale_says_is_used(figures: dict[str, Any], family: str) -> None:
    hits = figures["families"][family]
    assert hits["shuffled_rationale"] <= hits["always"] - 0.3
    assert hits["empty_rationale"] <= hits["always"] - 0.3


@pytest.mark.parametrize("family", ["match", "name"])
def test_auto_keeps_what_the_direct_embedding_has(figures: dict[str, Any], family: str) -> None:
    assert figures["families"][family]["auto"] >= figures["families"][family]["never"] - 0.005


def test_auto_reasons_on_little_of_the_mixed_traffic(figures: dict[str, Any]) -> None:
    mixed = figures["mixed"]
    assert mixed["auto"]["reasoning_rate"] <= 0.4
    assert mixed["auto"]["rationale_tokens"] <= 0.65 * mixed["always"]["rationale_tokens"]
    assert mixed["auto"]["hit_at_1"] > mixed["random_gate"]["hit_at_1"]
