"""Both routes of some pairs, and what any choice between them gives: a gate's, a random one's, an oracle's.

Axes: Q pairs, 2 the routes (without, with reasoning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import Encoded, Judge, Pair, encode_alone, encode_queries
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.routing.router import Route

Doubles = NDArray[np.float64]

BOTH: dict[str, EncodeOptions] = {"never": {"reasoning": "never"}, "always": {"reasoning": "always"}}


@dataclass(frozen=True)
class Outcome:
    """What one choice of routes did with every pair; where it is drawn at random, what it does in expectation."""

    hits_Q: Doubles  # 1 where the candidate of the highest cosine is a right one
    reasoned_Q: Doubles  # 1 where the pair reasoned
    tokens_Q: Doubles  # of the rationale
    scores_Q: Doubles  # of the gate
    seconds_Q: Doubles  # of a query embedded alone; NaN where it was not timed

    @classmethod
    def of(cls, encoded: Encoded, judge: Judge, seconds_Q: ArrayLike = np.nan) -> Outcome:
        """Judge embedded queries."""
        details = encoded.details
        return cls(
            judge.hits(encoded.embeddings_QD).astype(np.float64),
            np.array([detail.route is Route.REASON for detail in details], np.float64),
            np.array([detail.rationale_tokens for detail in details], np.float64),
            np.array([detail.gate_score for detail in details], np.float64),
            np.broadcast_to(np.asarray(seconds_Q, np.float64), len(details)),
        )

    def summary(self) -> dict[str, float]:
        """Return hit@1, mean rationale tokens, reasoning rate, and the median milliseconds of a query alone."""
        figures = {
            "hit_at_1": round(float(self.hits_Q.mean()), 4),
            "rationale_tokens": round(float(self.tokens_Q.mean()), 3),
            "reasoning_rate": round(float(self.reasoned_Q.mean()), 4),
        }
        timed_Q = self.seconds_Q[~np.isnan(self.seconds_Q)]
        return figures | ({"p50_ms": round(1000 * float(np.median(timed_Q)), 3)} if len(timed_Q) else {})


@dataclass(frozen=True)
class Routes:
    """What never and always reasoning did with the same pairs."""

    never: Outcome
    always: Outcome

    def at(self, reasons_Q: ArrayLike) -> Outcome:
        """Return what follows where `reasons_Q` reason; a number between 0 and 1 is a pair's probability."""
        share_Q = np.broadcast_to(np.asarray(reasons_Q, np.float64), len(self.never.hits_Q))

        def mixed(without_Q: Doubles, with_Q: Doubles) -> Doubles:
            drawn_Q = (1 - share_Q) * without_Q + share_Q * with_Q
            mixed_Q: Doubles = np.where(share_Q == 0, without_Q, np.where(share_Q == 1, with_Q, drawn_Q))
            return mixed_Q

        never, always = self.never, self.always
        return Outcome(
            mixed(never.hits_Q, always.hits_Q),
            share_Q,
            mixed(never.tokens_Q, always.tokens_Q),
            never.scores_Q,
            mixed(never.seconds_Q, always.seconds_Q),
        )

    def gate(self, threshold: float) -> Outcome:
        """Return what the gate gives at a threshold."""
        return self.at(self.never.scores_Q >= threshold)

    def random(self, rate: float) -> Outcome:
        """Return what drawing lots at a rate gives, in expectation."""
        return self.at(rate)

    def oracle(self, rate: float | None = None) -> Outcome:
        """Return what choosing by the outcome gives: pairs that gain first, those that lose last.

        Without a rate exactly the pairs reason whose miss reasoning turns into a hit.
        """
        gain_Q = self.always.hits_Q - self.never.hits_Q
        if rate is None:
            return self.at(gain_Q > 0)
        reasons_Q = np.zeros(len(gain_Q))
        order = np.lexsort((self.always.seconds_Q, -gain_Q))  # of equals the quickest first
        reasons_Q[order[: round(rate * len(gain_Q))]] = 1
        return self.at(reasons_Q)


def measure_routes(
    embedder: Embedder, pairs: Sequence[Pair], *, timed: Sequence[int] = (), judge: Judge | None = None
) -> Routes:
    """Embed the queries of pairs by both routes, and those at the indices `timed` alone as well, for their latency."""
    judge = Judge(embedder, pairs) if judge is None else judge
    seconds_2Q = {mode: np.full(len(pairs), np.nan) for mode in BOTH}
    for mode, index, _, seconds in encode_alone(embedder, [pairs[index] for index in timed], BOTH):
        seconds_2Q[mode][timed[index]] = seconds
    encoded = {mode: encode_queries(embedder, pairs, **options) for mode, options in BOTH.items()}
    never, always = (Outcome.of(encoded[mode], judge, seconds_2Q[mode]) for mode in BOTH)
    return Routes(never, always)
