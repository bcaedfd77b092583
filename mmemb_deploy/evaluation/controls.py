"""DigitChain with and without reasoning, with the controls that every quality table carries (METHOD).

never, always, auto     the three settings of `encode`
random_gate             as many inputs reason as under auto, drawn at random
oracle_gate             an input reasons where, and only where, reasoning turns its miss into a hit
shuffled_rationale      always, but with the rationale that another query of the same set was given
empty_rationale         always, but with nothing between `<think>` and `</think>`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.digitchain import FAMILIES, DigitChain
from mmemb_deploy.evaluation.pairs import Judge, Pair, encode_alone, encode_queries
from mmemb_deploy.evaluation.routes import Outcome, Routes
from mmemb_deploy.options import EncodeOptions

MODES = ("never", "always", "auto", "random_gate", "oracle_gate", "shuffled_rationale", "empty_rationale")
TIMED_PAIRS = 200  # of the mixed traffic, embedded one at a time, the modes in turn


def run_digitchain(
    embedder: Embedder, *, seed: int, queries: int, report: Callable[[str], None], timed: int = TIMED_PAIRS
) -> dict[str, Any]:
    """Measure `queries` pairs of every family, and as many of the mixed traffic, all from the test split.

    Returns hit@1 by family and mode, and the summaries of the mixed traffic by mode, of which `timed` queries are also
    embedded alone.
    """
    source = DigitChain("test", seed)
    report("mixed traffic")
    mixed = compare_modes(embedder, [Pair.of(example) for example in source.mixed(queries)], seed, timed=timed)
    rate = float(mixed["auto"].reasoned_Q.mean())
    families = {}
    for family in FAMILIES:
        report(family)
        pairs = [Pair.of(example) for example in source.examples(family, queries)]
        outcomes = compare_modes(embedder, pairs, seed, random_rate=rate)
        families[family] = {mode: outcomes[mode].summary()["hit_at_1"] for mode in MODES}
    return {"families": families, "mixed": {mode: mixed[mode].summary() for mode in MODES}}


def compare_modes(
    embedder: Embedder, pairs: Sequence[Pair], seed: int, *, random_rate: float | None = None, timed: int = 0
) -> dict[str, Outcome]:
    """Run every mode on the same pairs; `random_rate` is the random gate's, by default auto's own on these pairs."""
    judge = Judge(embedder, pairs)
    rng = np.random.default_rng(seed)
    settings: dict[str, EncodeOptions] = {mode: {"reasoning": mode} for mode in ("never", "always", "auto")}
    encoded = {mode: encode_queries(embedder, pairs, **options) for mode, options in settings.items()}
    written = [detail.rationale or "" for detail in encoded["always"].details]
    order = rng.permutation(len(pairs))
    shuffled = [""] * len(pairs)
    for index, other in zip(order, np.roll(order, 1), strict=True):
        shuffled[index] = written[other]
    for mode, rationales in (("shuffled_rationale", shuffled), ("empty_rationale", [""] * len(pairs))):
        settings[mode] = {"rationales": rationales}
        encoded[mode] = encode_queries(embedder, pairs, **settings[mode])
    seconds = {mode: np.full(len(pairs), np.nan) for mode in settings}
    for mode, index, _, took in encode_alone(embedder, pairs[:timed], settings):
        seconds[mode][index] = took
    outcomes = {mode: Outcome.of(encoded[mode], judge, seconds[mode]) for mode in settings}
    routes = Routes(outcomes["never"], outcomes["always"])
    rate = float(outcomes["auto"].reasoned_Q.mean()) if random_rate is None else random_rate
    drawn = np.zeros(len(pairs), bool)
    drawn[rng.permutation(len(pairs))[: round(rate * len(pairs))]] = True
    outcomes["random_gate"] = routes.at(drawn)
    outcomes["oracle_gate"] = routes.oracle()
    return {mode: outcomes[mode] for mode in MODES}
