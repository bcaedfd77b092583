"""Rollouts whose rationales an OpenAI-compatible server writes (vLLM and kin), for models too large to decode here.

The server holds a copy of the policy, which `publish` brings up to date before every batch; it renders chats by the
checkpoint's own template, so that it continues from the same prompt as the encoder. The decision, the embeddings and
the log-probabilities stay with the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from mmemb_deploy.errors import BackendError
from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.prompts import PromptFormat
from mmemb_deploy.reasoners.remote import policy_messages
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.control.rewards import Rollout
from mmemb_training.control.rollouts import Group, decisions
from mmemb_training.encoder import Encoder, Path
from mmemb_training.pool.endpoint import EndpointWorker
from mmemb_training.samples import Question, Sample, query_row

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam


class PolicyWorker(EndpointWorker):
    """Asks a server that holds the policy, in the policy's own layout. `samples` is the size of a group."""

    def __init__(self, prompt: PromptFormat, *, base_url: str, model: str, samples: int, max_tokens: int) -> None:
        super().__init__(
            "policy", base_url=base_url, model=model, samples=samples, max_tokens=max_tokens, stop=prompts.END_THINK
        )
        self._prompt = prompt

    def messages(self, question: Question) -> list[ChatCompletionMessageParam]:
        """Return system, instruction, images and text, as `mmemb_deploy.inputs.prompts` lays them out.

        Raises InputError for a video, whose times a chat does not carry.
        """
        instruction = self._prompt.query_instruction if question.instruction is None else question.instruction
        return policy_messages(self._prompt, instruction, parse(question.content))


class ServedRollouts:
    """Draws groups as `rollouts.draw_groups` does, with rationales from a server; `publish` sends it the weights."""

    def __init__(self, worker: PolicyWorker, publish: Callable[[Checkpoint], None]) -> None:
        self._worker = worker
        self._publish = publish

    def __call__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[Sample],
        *,
        size: int,
        paired: bool,
        max_tokens: int,
        seed: Sequence[int],
    ) -> list[Group]:
        """Return `size` rollouts of every question. Raises BackendError if the server fails on one of them."""
        self._publish(checkpoint)
        rows = [query_row(sample.question, checkpoint.rows) for sample in samples]
        encoder = Encoder(checkpoint)
        with torch.no_grad():
            think_Q = encoder(rows, []).decision_B2.softmax(dim=1)[:, 0].numpy(force=True)
        reasons_QG, forced_QG = decisions(think_Q, size, np.random.default_rng(seed), paired=paired)
        written = self._words(checkpoint, samples, reasons_QG.sum(axis=1).tolist(), max_tokens)
        paths = [Path(place, words) for place, texts in enumerate(written) for words in texts]
        with torch.no_grad():
            states = (F.normalize(state.float(), dim=1).numpy(force=True) for state in encoder.embed(rows, paths))
        direct_QD, reasoned_RD = states
        drawn = zip(paths, reasoned_RD, strict=True)
        groups: list[Group] = []
        for direct_D, reasons_G, forced_G in zip(direct_QD, reasons_QG, forced_QG, strict=True):
            group: Group = []
            for reasons, forced in zip(reasons_G, forced_G, strict=True):
                if not reasons:
                    group.append(Rollout(None, direct_D, forced=bool(forced)))
                    continue
                path, embedding_D = next(drawn)
                words = tuple(path.words)
                group.append(Rollout(words, embedding_D, truncated=len(words) >= max_tokens, forced=bool(forced)))
            groups.append(group)
        return groups

    def _words(
        self, checkpoint: Checkpoint, samples: Sequence[Sample], counts: Sequence[int], max_tokens: int
    ) -> list[list[list[int]]]:
        """Return as many rationales of every question as its group needs, as token ids."""
        found = self._worker.write([sample.question for sample in samples])
        for sample, written in zip(samples, found, strict=True):
            if written.error is not None:
                raise BackendError(f"the policy's server failed on {sample.question.key}: {written.error}")
        return [
            [checkpoint.rows.prompt.words(text)[:max_tokens] for text in written.rationales[:count]]
            for written, count in zip(found, counts, strict=True)
        ]
