"""DigitChain with and without reasoning, with the controls that every quality table carries (METHOD).

    never, always, auto     the three settings of `encode`
    random_gate             as many inputs reason as under auto, drawn at random
    oracle_gate             an input reasons where, and only where, reasoning turns its miss into a hit
    shuffled_rationale      always, but with the rationale that another query of the same set was given
    empty_rationale         always, but with nothing between `<think>` and `</think>`

Axes: Q pairs, L timed pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.digitchain import FAMILIES, DigitChain
from mmemb_deploy.evaluation.pairs import Encoded, Judge, Pair, encode_queries
from mmemb_deploy.routing.router import Route

MODES = ("never", "always", "auto", "random_gate", "oracle_gate", "shuffled_rationale", "empty_rationale")
TIMED_PAIRS = 200  # of the mixed traffic, embedded one at a time, the modes in turn


@dataclass(frozen=True)
class Outcome:
    """What one mode did with every pair."""

    hits_Q: NDArray[np.bool_]
    reasoned_Q: NDArray[np.bool_]
    scores_Q: NDArray[np.float64]  # of the gate
    tokens_Q: NDArray[np.int64]  # of the rationale
    seconds_L: NDArray[np.float64]  # of a query embedded alone; empty where not timed

    @classmethod
    def of(cls, encoded: Encoded, judge: Judge, seconds_L: NDArray[np.float64]) -> Outcome:
        """Judge embedded queries."""
        return cls(
            judge.hits(encoded.embeddings_QD),
            np.array([detail.route is Route.REASON for detail in encoded.details]),
            np.array([detail.gate_score for detail in encoded.details]),
            np.array([detail.rationale_tokens for detail in encoded.details]),
            seconds_L,
        )

    @staticmethod
    def routed(never: Outcome, always: Outcome, reasons_Q: NDArray[np.bool_]) -> Outcome:
        """Return what a gate that sends `reasons_Q` to reasoning would have done."""
        timed = len(never.seconds_L)
        return Outcome(
            np.where(reasons_Q, always.hits_Q, never.hits_Q),
            reasons_Q,
            always.scores_Q,
            np.where(reasons_Q, always.tokens_Q, 0),
            np.where(reasons_Q[:timed], always.seconds_L, never.seconds_L),
        )

    def summary(self) -> dict[str, float]:
        """Return hit@1, mean rationale tokens, reasoning rate, and the median milliseconds of a query alone."""
        figures = {
            "hit_at_1": round(float(self.hits_Q.mean()), 4),
            "rationale_tokens": round(float(self.tokens_Q.mean()), 3),
            "reasoning_rate": round(float(self.reasoned_Q.mean()), 4),
        }
        if len(self.seconds_L):
            figures["p50_ms"] = round(1000 * float(np.median(self.seconds_L)), 3)
        return figures


@dataclass(frozen=True)
class DigitChainResult:
    """Outcomes of every mode, by family and on mixed traffic."""

    families: dict[str, dict[str, Outcome]]
    mixed: dict[str, Outcome]

    def as_json(self) -> dict[str, Any]:
        """Return hit@1 by family and mode, and the summaries of the mixed traffic by mode."""
        return {
            "families": {
                family: {mode: round(float(outcomes[mode].hits_Q.mean()), 4) for mode in MODES}
                for family, outcomes in self.families.items()
            },
            "mixed": {mode: self.mixed[mode].summary() for mode in MODES},
        }


def run_digitchain(
    embedder: Embedder, *, seed: int, queries: int, report: Callable[[str], None], timed: int = TIMED_PAIRS
) -> DigitChainResult:
    """Measure `queries` pairs of every family, and as many of the mixed traffic, all from the test split.

    `timed` queries of the mixed traffic are also embedded alone.
    """
    source = DigitChain("test", seed)
    report("mixed traffic")
    mixed = compare_modes(embedder, [Pair.of(example) for example in source.mixed(queries)], seed, timed=timed)
    rate = float(mixed["auto"].reasoned_Q.mean())
    families = {}
    for family in FAMILIES:
        report(family)
        pairs = [Pair.of(example) for example in source.examples(family, queries)]
        families[family] = compare_modes(embedder, pairs, seed, random_rate=rate)
    return DigitChainResult(families, mixed)


def compare_modes(
    embedder: Embedder, pairs: Sequence[Pair], seed: int, *, random_rate: float | None = None, timed: int = 0
) -> dict[str, Outcome]:
    """Run every mode on the same pairs; `random_rate` is the random gate's, by default auto's own on these pairs."""
    judge = Judge(embedder, pairs)
    rng = np.random.default_rng(seed)
    settings: dict[str, dict[str, Any]] = {mode: {"reasoning": mode} for mode in ("never", "always", "auto")}
    encoded = {mode: encode_queries(embedder, pairs, **options) for mode, options in settings.items()}
    written = [detail.rationale or "" for detail in encoded["always"].details]
    order = rng.permutation(len(pairs))
    shuffled = [""] * len(pairs)
    for place, other in zip(order, np.roll(order, 1), strict=True):
        shuffled[place] = written[other]
    for mode, rationales in (("shuffled_rationale", shuffled), ("empty_rationale", [""] * len(pairs))):
        settings[mode] = {"rationales": rationales}
        encoded[mode] = encode_queries(embedder, pairs, rationales=rationales)
    seconds = _time_alone(embedder, pairs[:timed], settings)
    outcomes = {mode: Outcome.of(encoded[mode], judge, seconds[mode]) for mode in settings}
    never, always = outcomes["never"], outcomes["always"]
    rate = float(outcomes["auto"].reasoned_Q.mean()) if random_rate is None else random_rate
    drawn = np.zeros(len(pairs), bool)
    drawn[rng.permutation(len(pairs))[: round(rate * len(pairs))]] = True
    outcomes["random_gate"] = Outcome.routed(never, always, drawn)
    outcomes["oracle_gate"] = Outcome.routed(never, always, ~never.hits_Q & always.hits_Q)
    return {mode: outcomes[mode] for mode in MODES}


def _time_alone(
    embedder: Embedder, pairs: Sequence[Pair], settings: dict[str, dict[str, Any]]
) -> dict[str, NDArray[np.float64]]:
    """Return the seconds of every pair's query, embedded alone, the modes in turn; the first pair also warms up."""
    seconds: dict[str, list[float]] = {mode: [] for mode in settings}
    for place, pair in [*enumerate(pairs[:1]), *enumerate(pairs)]:
        for mode, options in settings.items():
            alone = options.copy()
            if "rationales" in options:
                alone["rationales"] = [options["rationales"][place]]
            began = time.perf_counter()
            encode_queries(embedder, [pair], **alone)
            seconds[mode].append(time.perf_counter() - began)
    return {mode: np.array(values[1:]) for mode, values in seconds.items()}
