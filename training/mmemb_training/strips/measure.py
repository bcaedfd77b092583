"""What a model does with the test strips by both routes, and what a gate over them is worth.

Axes: L renderings of the same questions, Q questions, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.evaluation.digitchain import Split
from mmemb_deploy.evaluation.pairs import Encoded, Judge, encode_queries
from mmemb_deploy.files import whole
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.runtime import torch_embedder
from mmemb_training.strips.questions import draw_pairs, draw_strips

Doubles = NDArray[np.float64]
TOLERANCE = 0.005  # of hit@1: how far below the best a threshold may be


@dataclass(frozen=True)
class Seen:
    """Both routes of the same questions, in several renderings."""

    never_LQ: Doubles  # 1 where the nearest candidate is the right one
    always_LQ: Doubles
    tokens_LQ: Doubles  # of the rationale that is written
    scores_LQ: Doubles  # of the decision
    margins_LQ: Doubles  # of the nearest candidate over the next, by the direct embedding
    direct_LQD: Doubles

    @classmethod
    def of(cls, checkpoint: Checkpoint, split: Split, seed: int, count: int, renderings: int) -> Seen:
        """Embed questions by both routes, each rendering anew, beside candidates that are embedded once."""
        embedder = torch_embedder(checkpoint)
        pairs = draw_pairs(split, seed, count)
        judge, found = Judge(embedder, pairs), list[tuple[Doubles, ...]]()
        for rendering in range(renderings):
            samples = draw_strips(split, seed, count, rendering).samples
            shown = [
                pair.model_copy(update={"query": sample.question.content})
                for pair, sample in zip(pairs, samples, strict=True)
            ]
            never = encode_queries(embedder, shown, reasoning="never")
            always = encode_queries(embedder, shown, reasoning="always")
            found.append(_row(judge, never, always))
        return cls(*(np.stack(parts) for parts in zip(*found, strict=True)))

    def save(self, path: Path) -> None:
        """Write all arrays as NPZ."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        with whole(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Seen:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def rendering(self, index: int) -> Seen:
        """Return what was seen in one rendering."""
        return Seen(*(getattr(self, field.name)[index : index + 1] for field in fields(self)))

    def at(self, reasons_LQ: NDArray[np.bool_]) -> Chosen:
        """Return what follows where `reasons_LQ` reason."""
        hits_LQ = np.where(reasons_LQ, self.always_LQ, self.never_LQ)
        return Chosen(hits_LQ.mean(axis=0), float(reasons_LQ.mean()), float((self.tokens_LQ * reasons_LQ).mean()))

    def random(self, rate: float) -> float:
        """Return the hit@1 in expectation where a share of the questions reasons, drawn at random."""
        return float((1 - rate) * self.never_LQ.mean() + rate * self.always_LQ.mean())

    def oracle(self, rate: float) -> float:
        """Return the hit@1 where a share of the questions reasons: those that gain most in their other renderings.

        So no rendering's luck chooses for itself. Needs two renderings or more.
        """
        gain_LQ = self.always_LQ - self.never_LQ
        others_LQ = (gain_LQ.sum(axis=0) - gain_LQ) / (len(gain_LQ) - 1)
        reasons_LQ = np.zeros(gain_LQ.shape, bool)
        count = round(rate * gain_LQ.shape[1])
        np.put_along_axis(reasons_LQ, np.argsort(-others_LQ, axis=1, kind="stable")[:, :count], True, axis=1)
        return float(self.at(reasons_LQ).hits_Q.mean())


@dataclass(frozen=True)
class Chosen:
    """What one choice of routes did: hits by question, averaged over renderings; rate; tokens a question."""

    hits_Q: Doubles
    rate: float
    tokens: float


Gate = Callable[[Seen], Doubles]  # orders questions, (L, Q): the higher, the sooner one reasons


def by_decision(seen: Seen) -> Doubles:
    """The model's own decision."""
    return seen.scores_LQ


def by_margin(seen: Seen) -> Doubles:
    """The structure of the direct embedding's scores: what has a near rival reasons (SURE, arXiv 2609.29560)."""
    return -seen.margins_LQ


def best_threshold(held_out: Seen, gate: Gate) -> float:
    """Return the highest threshold whose hit@1 on held-out questions is within TOLERANCE of the best."""
    thresholds, outcomes = _outcomes(held_out, gate)
    hits = np.array([outcome.hits_Q.mean() for outcome in outcomes])
    return float(thresholds[np.flatnonzero(hits >= hits.max() - TOLERANCE)].max())


def threshold_of_tokens(held_out: Seen, gate: Gate, tokens: float) -> float:
    """Return the lowest threshold that writes at most so many tokens a held-out question."""
    thresholds, outcomes = _outcomes(held_out, gate)
    return float(min(at for at, outcome in zip(thresholds, outcomes, strict=True) if outcome.tokens <= tokens))


def _outcomes(held_out: Seen, gate: Gate) -> tuple[Doubles, list[Chosen]]:
    """Return thresholds between never and always, at 201 quantiles of the scores and above them all, and outcomes."""
    scores_LQ = gate(held_out)
    thresholds = np.unique(np.quantile(scores_LQ, np.linspace(0, 1, 201)))
    thresholds = np.append(thresholds, np.nextafter(thresholds[-1], np.inf))
    return thresholds, [held_out.at(scores_LQ >= threshold) for threshold in thresholds]


def _row(judge: Judge, never: Encoded, always: Encoded) -> tuple[Doubles, ...]:
    return (
        judge.hits(never.embeddings_QD).astype(np.float64),
        judge.hits(always.embeddings_QD).astype(np.float64),
        np.array([detail.rationale_tokens for detail in always.details], np.float64),
        np.array([detail.gate_score for detail in never.details], np.float64),
        judge.margins(never.embeddings_QD).astype(np.float64),
        never.embeddings_QD.astype(np.float64),
    )
