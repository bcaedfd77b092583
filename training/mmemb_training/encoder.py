"""The model as every stage of training reads it: one prefill per prompt, and any number of rationales after it.

    prompt ... <|disc_emb|>                               direct embedding, decision, KV cache
                 <think> rationale </think> <|gen_emb|>   reasoned embedding, log-probabilities of its tokens

Rationales continue from their prompt's cache, as the runtime does: the candidates of one query, or the rollouts of one
group, share its prefill. Axes: B prompts, R rationales, T tokens of a path, D hidden size, 2 = (`<think>`, stop).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.rows import Batch, Row, collate
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.model import KeyValue, decoder_forward, last_state
from mmemb_training.prefill import prefill


@dataclass(frozen=True)
class Continuation:
    """A rationale that follows one prompt, by the prompt's index: its token ids, without markers."""

    prompt: int
    token_ids: Sequence[int]


class Reading(NamedTuple):
    """What one forward pass found. States are not normalised; log-probabilities are 0 where a path has no token.

    `logprobs_RT` holds the rationale's tokens and `</think>`; `<think>` is the decision, and `<|gen_emb|>` is forced.
    """

    direct_BD: Tensor
    decision_B2: Tensor
    reasoned_RD: Tensor
    logprobs_RT: Tensor


class Encoder(nn.Module):
    """A Qwen3-VL behind one forward pass, so that DDP and FSDP can wrap it. It owns the checkpoint's model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = checkpoint.model
        self.spec = checkpoint.vision
        self.prompt = checkpoint.rows.prompt
        self.ids = self.prompt.ids

    def forward(self, rows: Sequence[Row], paths: Sequence[Continuation]) -> Reading:
        """Read prompts, each up to `<|disc_emb|>`, and rationales after some of them."""
        batch, cache, direct_BD = self._prefill(rows)
        device = direct_BD.device
        choices = torch.tensor([self.ids[prompts.THINK], self.ids[prompts.STOP]], device=device)
        decision_B2 = self.model.lm_head(direct_BD).float().log_softmax(dim=-1)[:, choices]
        if not paths:
            return Reading(
                direct_BD, decision_B2, direct_BD.new_zeros(0, direct_BD.shape[1]), decision_B2.new_zeros(0, 1)
            )
        hidden_RTD, ids_RT, lengths_R = self._follow(batch, cache, *self._tokens(paths))
        reasoned_RD = last_state(hidden_RTD, lengths_R - 1)
        predicts_RT = torch.arange(hidden_RTD.shape[1] - 2, device=device) < lengths_R[:, None] - 2
        logits_NV = self.model.lm_head(hidden_RTD[:, :-2][predicts_RT]).float()
        logprobs_N = -nn.functional.cross_entropy(logits_NV, ids_RT[:, 1:-1][predicts_RT], reduction="none")
        logprobs_RT = logprobs_N.new_zeros(predicts_RT.shape).masked_scatter(predicts_RT, logprobs_N)
        return Reading(direct_BD, decision_B2, reasoned_RD, logprobs_RT)

    def embed(self, rows: Sequence[Row], paths: Sequence[Continuation], *, at_once: int = 128) -> tuple[Tensor, Tensor]:
        """Return the states at `<|disc_emb|>` (B, D) and `<|gen_emb|>` (R, D) alone, `at_once` rationales in a pass."""
        batch, cache, direct_BD = self._prefill(rows)
        reasoned_RD = direct_BD.new_empty(len(paths), direct_BD.shape[1])
        order = sorted(range(len(paths)), key=lambda index: len(paths[index].token_ids))
        for start in range(0, len(paths), at_once):
            chosen = order[start : start + at_once]
            hidden_RTD, _, lengths_R = self._follow(batch, cache, *self._tokens([paths[index] for index in chosen]))
            reasoned_RD[chosen] = last_state(hidden_RTD, lengths_R - 1)
        return direct_BD, reasoned_RD

    def next_logits(self, rows: Sequence[Row], continued: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Return the logits after prompts that go on with tokens, (R, V); `continued` holds prompts and tokens."""
        batch, cache, _ = self._prefill(rows)
        owners, tokens = [owner for owner, _ in continued], [list(token_ids) for _, token_ids in continued]
        hidden_RTD, _, lengths_R = self._follow(batch, cache, owners, tokens)
        logits_RV: Tensor = self.model.lm_head(last_state(hidden_RTD, lengths_R - 1))
        return logits_RV

    def _prefill(self, rows: Sequence[Row]) -> tuple[Batch, list[KeyValue], Tensor]:
        """Return prompts as a batch, their KV cache, and their states at `<|disc_emb|>`, (B, D)."""
        batch = collate(rows, self.ids[prompts.PAD])
        hidden_BSD, cache = prefill(self.model, batch, self.spec)
        return batch, cache, last_state(hidden_BSD, torch.from_numpy(batch.last_B).to(hidden_BSD.device))

    def _tokens(self, paths: Sequence[Continuation]) -> tuple[list[int], list[list[int]]]:
        """Return the prompts that paths follow, and their tokens with markers."""
        return [path.prompt for path in paths], [self.prompt.path(path.token_ids) for path in paths]

    def _follow(
        self, batch: Batch, cache: list[KeyValue], owners: Sequence[int], tokens: Sequence[list[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states of tokens that follow the prompts `owners`, (R, T, D), their ids and their lengths."""
        lengths_R = np.array([len(row) for row in tokens])
        token_ids_RT = np.full((len(tokens), lengths_R.max()), self.ids[prompts.PAD], np.int64)
        for index, row in enumerate(tokens):
            token_ids_RT[index, : len(row)] = row
        steps_T = np.arange(lengths_R.max())
        owners_R = np.asarray(owners)
        starts_R = batch.position_ids_3BT[0, owners_R, batch.last_B[owners_R]] + 1
        mask_RK = np.concatenate([batch.mask_BT[owners_R], steps_T < lengths_R[:, None]], axis=1).astype(np.int64)
        device = cache[0][0].device
        index_R, ids_RT = torch.from_numpy(owners_R).to(device), torch.from_numpy(token_ids_RT).to(device)
        if list(owners) != list(range(len(batch.mask_BT))):  # else the cache serves as it is, uncopied
            cache = [(keys.index_select(0, index_R), values.index_select(0, index_R)) for keys, values in cache]
        hidden_RTD, _ = decoder_forward(
            self.model.model.language_model,
            ids_RT,
            torch.from_numpy(starts_R[:, None] + steps_T).to(device).expand(3, -1, -1),
            torch.from_numpy(mask_RK).to(device),
            past=cache,
        )
        return hidden_RTD, ids_RT, torch.from_numpy(lengths_R).to(device)
