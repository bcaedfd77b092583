"""The model as every stage of training reads it: one prefill per prompt, and any number of rationales after it.

    prompt ... <|disc_emb|>                               direct embedding, decision, KV cache
                 <think> rationale </think> <|gen_emb|>   reasoned embedding, log-probabilities of its tokens

Rationales continue from their prompt's cache, as the runtime does: the candidates of one query, or the rollouts of one
group, share its prefill. Axes: B prompts, R rationales, T tokens of a path, D hidden size, 2 = (`<think>`, stop).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.rows import Batch, Row, collate
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.model import KeyValue, decoder_forward, last_state
from mmemb_training.prefill import prefill

PROMPT_TOKENS = 32_768  # of the prompts whose caches are held at once; 4.8 GB of cache at 4B
CONTEXT_TOKENS = 131_072  # of the contexts that what follows reads at once; at 4B, 0.5 GB of a layer's cache
LOGITS_AT_ONCE = 256  # rows of a vocabulary


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
        batch, cache, direct_BD = self._prefill(rows, keep=bool(paths))
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

    def embed(self, rows: Sequence[Row], paths: Sequence[Continuation]) -> tuple[Tensor, Tensor]:
        """Return the states at `<|disc_emb|>` (B, D) and `<|gen_emb|>` (R, D) alone, in passes of bounded size."""
        return self._last_states(rows, *self._tokens(paths))

    def next_logits(
        self, rows: Sequence[Row], continued: Sequence[tuple[int, Sequence[int]]], token_ids: Sequence[int]
    ) -> Tensor:
        """Return the logits of some tokens after prompts that go on, (R, len(token_ids)), in passes of bounded size.

        `continued` holds prompts and the tokens that they go on with.
        """
        owners, tokens = [owner for owner, _ in continued], [list(tokens) for _, tokens in continued]
        _, last_RD = self._last_states(rows, owners, tokens)
        logits = [self.model.lm_head(part_RD)[:, list(token_ids)] for part_RD in last_RD.split(LOGITS_AT_ONCE)]
        return torch.cat(logits)

    def _last_states(
        self, rows: Sequence[Row], owners: Sequence[int], tokens: Sequence[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Return the last states of prompts (B, D), and of the tokens that go on after the prompts `owners`, (R, D).

        At once, prompts of PROMPT_TOKENS are read and hold their caches, and in turn what goes on after them: as much
        of it as attends to CONTEXT_TOKENS, of which each layer holds a copy while it runs.
        """
        prompt_B = np.array([row.length for row in rows])
        path_R, owners_R = np.array([len(row) for row in tokens], np.int64), np.array(owners, np.int64)
        prompts_BD, paths_RD = list[Tensor](), list[Tensor]()
        order_B, order_R = list[int](), list[int]()
        for chosen_B in _within(prompt_B, np.argsort(prompt_B, kind="stable"), PROMPT_TOKENS):
            follow_R = np.flatnonzero(np.isin(owners_R, chosen_B))
            batch, cache, direct_BD = self._prefill([rows[index] for index in chosen_B], keep=len(follow_R) > 0)
            prompts_BD.append(direct_BD)
            order_B += chosen_B
            place_B = {owner: place for place, owner in enumerate(chosen_B)}
            longest = int(prompt_B[chosen_B].max())
            follow_R = follow_R[np.argsort(path_R[follow_R], kind="stable")]
            for chosen_R in _within(longest + path_R, follow_R, CONTEXT_TOKENS):
                places = [place_B[int(owners_R[index])] for index in chosen_R]
                hidden_RTD, _, lengths_R = self._follow(batch, cache, places, [tokens[index] for index in chosen_R])
                paths_RD.append(last_state(hidden_RTD, lengths_R - 1))
                order_R += chosen_R
        direct_BD = torch.cat(prompts_BD)[np.argsort(order_B)]
        return direct_BD, torch.cat(paths_RD)[np.argsort(order_R)] if paths_RD else direct_BD[:0]

    def _prefill(self, rows: Sequence[Row], *, keep: bool = True) -> tuple[Batch, list[KeyValue], Tensor]:
        """Return prompts as a batch, their KV cache if it is to be kept, and their last states, (B, D)."""
        batch = collate(rows, self.ids[prompts.PAD])
        hidden_BSD, cache = prefill(self.model, batch, self.spec, keep=keep)
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
        ids_RT = torch.from_numpy(token_ids_RT).to(device)
        one_each = list(owners) == list(range(len(batch.mask_BT)))  # the cache then serves as it is, uncopied
        hidden_RTD, _ = decoder_forward(
            self.model.model.language_model,
            ids_RT,
            torch.from_numpy(starts_R[:, None] + steps_T).to(device).expand(3, -1, -1),
            torch.from_numpy(mask_RK).to(device),
            past=cache,
            owners_B=None if one_each else torch.from_numpy(owners_R).to(device),
            keep=False,
        )
        return hidden_RTD, ids_RT, torch.from_numpy(lengths_R).to(device)


def _within(lengths: NDArray[np.int64], order: NDArray[np.int64], tokens: int) -> Iterator[list[int]]:
    """Yield indices in an order of ascending lengths, together as many as `tokens` hold when padded, at least one."""
    part: list[int] = []
    for index in order.tolist():
        if part and (len(part) + 1) * lengths[index] > tokens:
            yield part
            part = []
        part.append(index)
    if part:
        yield part
