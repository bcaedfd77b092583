"""Frozen evaluators: how sure is a model that a question and its target match, with and without a rationale?

Two behind one interface: an embedder's softmax over hard negatives, and a judge's "yes" against "no". Both read a
question once and every rationale from its KV cache. Axes: Q questions, C candidates, R rationales, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.rows import Row
from mmemb_training.ahead import in_threads
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.encoder import Continuation, Encoder
from mmemb_training.samples import Sample, query_row
from mmemb_training.selection.bank import TargetBank

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Confidence:
    """Log-odds or log-probabilities l of a match: without a rationale, and with each of those that were asked about.

    `found` says whether the evaluator already takes the pair for a match without a rationale: the embedder ranks the
    target above all negatives, the judge says "yes". `gain_on_negatives` is, per rationale, the mean of l(with) -
    l(without) over the question's negatives, where the evaluator has negatives.
    """

    without: float
    with_each: tuple[float, ...]
    found: bool
    gain_on_negatives: tuple[float, ...] | None = None


class Evaluator(Protocol):
    """Scores pairs; nothing of it is trained."""

    def confidences(self, samples: Sequence[Sample], rationales: Sequence[Sequence[str]]) -> list[Confidence]:
        """Return the confidence in every sample, given each of its rationales in turn."""
        ...


class EmbedderEvaluator:
    """Ours; needs no second model: l = log softmax over {t} and the sample's negatives of cos(z, .) / tau, at t.

    The checkpoint must embed already. The small model's does, after a contrastive stage; a public model does not, since
    its `<|disc_emb|>` is untrained, and `run_recipe` refuses it.
    """

    def __init__(self, checkpoint: Checkpoint, bank: TargetBank, *, temperature: float) -> None:
        self._encoder = Encoder(checkpoint).eval()
        self._rows = checkpoint.rows
        self._bank = bank
        self._temperature = temperature

    def confidences(self, samples: Sequence[Sample], rationales: Sequence[Sequence[str]]) -> list[Confidence]:
        """Return the confidence in every sample, given each of its rationales in turn."""
        tokenize = self._rows.prompt.tokenize
        paths = [Continuation(index, tokenize(text)) for index, given in enumerate(rationales) for text in given]
        with torch.inference_mode():
            rows = in_threads(lambda sample: query_row(sample.question, self._rows), samples)
            states = self._encoder.embed(rows, paths)
        direct_QD, reasoned_RD = (F.normalize(state.float(), dim=-1) for state in states)
        groups = reasoned_RD.split([len(given) for given in rationales])
        return [
            self._confidence(direct_D, group_RD, torch.from_numpy(self._bank.candidates(sample)).to(direct_D))
            for direct_D, group_RD, sample in zip(direct_QD, groups, samples, strict=True)
        ]

    def _confidence(self, direct_D: Tensor, reasoned_RD: Tensor, candidates_CD: Tensor) -> Confidence:
        views_VD = torch.cat((direct_D[None], reasoned_RD))
        l_VC = (views_VD @ candidates_CD.T / self._temperature).log_softmax(dim=-1)
        gain_RC = l_VC[1:] - l_VC[0]
        on_negatives = gain_RC[:, 1:].mean(dim=1) if len(candidates_CD) > 1 else gain_RC.new_zeros(len(gain_RC))
        found = bool(l_VC[0, 0] >= l_VC[0].max())
        return Confidence(float(l_VC[0, 0]), tuple(l_VC[1:, 0].tolist()), found, tuple(on_negatives.tolist()))


JUDGE_INSTRUCTION = "Decide whether the candidate is what the query asks for. The query's images come first."


class JudgeEvaluator:
    """As the paper: a model answers whether q, with r, matches t; l = logit("yes") - logit("no").

    The model is any Qwen3-VL in this project's checkpoint format, such as a public Instruct model after
    `mmemb_training.prepare`. A run takes the model that it starts from, untuned: which evaluator the paper has is not
    known. Question and candidate are read once; each rationale follows as the beginning of the
    answer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._encoder = Encoder(checkpoint).eval()
        self._rows = checkpoint.rows
        self._answers = [self._last_token("yes"), self._last_token("no")]

    def confidences(self, samples: Sequence[Sample], rationales: Sequence[Sequence[str]]) -> list[Confidence]:
        """Return the confidence in every sample, given each of its rationales in turn."""
        tokenize = self._rows.prompt.tokenize
        ask = tokenize("Does the candidate match? Answer:")
        tails = [[ask, *(tokenize(f"About the query: {text}\n") + ask for text in given)] for given in rationales]
        prompts = in_threads(self._pair_row, samples)
        continued = [(index, tail) for index, group in enumerate(tails) for tail in group]
        with torch.inference_mode():
            logits_R2 = self._encoder.next_logits(prompts, continued, self._answers)
        yes_R, no_R = logits_R2.float().unbind(dim=1)
        odds = iter((yes_R - no_R).tolist())
        each = [(next(odds), tuple(next(odds) for _ in given)) for given in rationales]
        return [Confidence(without, with_each, found=without > 0) for without, with_each in each]

    def _pair_row(self, sample: Sample) -> Row:
        """Return one prompt that shows both sides of a pair, up to where an answer begins."""
        query, candidate = (parse(side.content, vision=self._rows.vision) for side in (sample.question, sample.target))
        if query.frames and candidate.frames:
            raise OptionError(
                f"{sample.question.key}: the judge reads one video per pair, and both sides have one; choose the "
                f"embedder as evaluator"
            )
        video = query if query.frames else candidate
        asked = self._rows.prompt.format.asked(sample.question.instruction)
        text = f"Query: {asked} {query.text}\nCandidate: {candidate.text}"
        both = replace(video, text=text, images=(*query.images, *candidate.images))
        row = self._rows.row(both, JUDGE_INSTRUCTION)
        return replace(  # up to the answer: without `<|disc_emb|>`
            row,
            token_ids_S=row.token_ids_S[:-1],
            position_ids_3S=row.position_ids_3S[:, :-1],
            visual_index_S=row.visual_index_S[:-1],
        )

    def _last_token(self, word: str) -> int:
        (*_, token) = self._rows.prompt.tokenize(f" {word}")
        return token
