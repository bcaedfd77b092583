"""One batch of rollouts: what the policy gradient and its companions are made of (`grpo` states the formulas).

Axes: Q questions, G rollouts of a question, R rollouts that reason, T tokens of a rationale, 2 = (`<think>`, stop).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmemb_deploy.inputs.rows import RowEncoder
from mmemb_training.ahead import in_threads
from mmemb_training.control.rewards import Rollout, Scored, advantages
from mmemb_training.control.rollouts import Group
from mmemb_training.encoder import Continuation, Reading
from mmemb_training.grad_cache import Chunk
from mmemb_training.recipes.settings import Advantage, ControlRecipe
from mmemb_training.samples import Sample, query_row


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of some questions, scored, with the log-probabilities of the policy that drew them.

    `chunks` is what the encoder reads of them, decoded once for all its steps.
    """

    samples: Sequence[Sample]
    chunks: Sequence[Chunk]
    groups: Sequence[Group]
    scored: Sequence[Scored]
    old: Reading
    reference: Reading


def chunks_of(samples: Sequence[Sample], groups: Sequence[Group], encoder: RowEncoder, size: int | None) -> list[Chunk]:
    """Return what the encoder is to read, `size` questions at once (None: all), each with its group's rationales."""
    chunks, size = list[Chunk](), size or len(samples)
    for start in range(0, len(samples), size):
        part = groups[start : start + size]
        rows = in_threads(lambda sample: query_row(sample.question, encoder), samples[start : start + size])
        chunks.append(
            Chunk(
                rows,
                [Continuation(index, one.token_ids) for index, one in _reasoning(part) if one.token_ids is not None],
            )
        )
    return chunks


def read_alone(encoder: Any, chunks: Sequence[Chunk]) -> Reading:
    """Read chunks without gradients."""
    with torch.no_grad():
        return merged([encoder(chunk.rows, chunk.paths) for chunk in chunks])


def merged(readings: Sequence[Reading]) -> Reading:
    """Return the readings of chunks as one, log-probabilities padded to the longest."""
    longest = max(reading.logprobs_RT.shape[1] for reading in readings)
    logprobs = [F.pad(reading.logprobs_RT, (0, longest - reading.logprobs_RT.shape[1])) for reading in readings]
    direct, decision, reasoned = (torch.cat(parts) for parts in list(zip(*readings, strict=True))[:3])
    return Reading(direct, decision, reasoned, torch.cat(logprobs))


def _reasoning(groups: Sequence[Group]) -> list[tuple[int, Rollout]]:
    """Return the rollouts that reason, with their questions' indices, in the order of the encoder's paths."""
    return [
        (index, rollout) for index, group in enumerate(groups) for rollout in group if rollout.token_ids is not None
    ]


def policy_terms(reading: Reading, batch: RolloutBatch, recipe: ControlRecipe) -> dict[str, Tensor]:
    """Return the terms of the loss: policy_decision, policy_rationale, kl and anchor."""
    device = reading.direct_BD.device
    reasons_QG = torch.tensor([[one.token_ids is not None for one in group] for group in batch.groups], device=device)
    drawn_QG = torch.tensor([[not one.forced for one in group] for group in batch.groups], device=device)
    members = reasons_QG.numpy(force=True)
    whole_QG, among_QG = (
        _advantages(batch, compared, recipe.advantage).to(device) for compared in (np.ones_like(members), members)
    )
    logp, old, reference = (part.decision_B2.log_softmax(dim=1) for part in (reading, batch.old, batch.reference))
    if recipe.groups == "expected":
        worth_Q2 = torch.stack([_mean(whole_QG, members_QG) for members_QG in (reasons_QG, ~reasons_QG)], dim=1)
        decision = -(logp.exp() * worth_Q2).sum(dim=1).mean()
    else:
        action_QG = (~reasons_QG).long()
        decided_QG = _clipped(logp.gather(1, action_QG) - old.gather(1, action_QG), whole_QG, recipe.clip)
        decision = -(decided_QG * drawn_QG).sum() / drawn_QG.sum().clamp(min=1)
    kl_Q = (logp.exp() * (logp - reference)).sum(dim=1)

    ours, theirs = (torch.cat((part.direct_BD, part.reasoned_RD)) for part in (reading, batch.reference))
    drift = 1 - F.cosine_similarity(ours, theirs, dim=1)
    terms = {
        "policy_decision": decision,
        "policy_rationale": reading.logprobs_RT.sum() * 0.0,
        "kl": kl_Q.mean(),
        "anchor": drift.mean(),
    }
    if reading.logprobs_RT.numel():
        spoken_RT = _spoken(batch, reading.logprobs_RT)
        count = spoken_RT.sum().clamp(min=1)
        gained_RT = _clipped(reading.logprobs_RT - batch.old.logprobs_RT, among_QG[reasons_QG][:, None], recipe.clip)
        behind_RT = batch.reference.logprobs_RT - reading.logprobs_RT
        terms["policy_rationale"] = -(gained_RT * spoken_RT).sum() / count
        terms["kl"] = terms["kl"] + ((behind_RT.exp() - behind_RT - 1) * spoken_RT).sum() / count
    return terms


def _spoken(batch: RolloutBatch, logprobs_RT: Tensor) -> Tensor:
    """Return which tokens were drawn, (R, T): all and `</think>`, but for a `</think>` that the token limit forced."""
    drawn_R = [len(one.token_ids or ()) + (not one.truncated) for _, one in _reasoning(batch.groups)]
    index_T = torch.arange(logprobs_RT.shape[1], device=logprobs_RT.device)
    return index_T < torch.tensor(drawn_R, device=logprobs_RT.device)[:, None]


def _advantages(batch: RolloutBatch, members_QG: NDArray[np.bool_], kind: Advantage) -> Tensor:
    """Return how much better each member is than its group's others, (Q, G)."""
    pairs = zip(batch.scored, members_QG, strict=True)
    return torch.from_numpy(np.stack([advantages(scored.reward_G, members_G, kind) for scored, members_G in pairs]))


def _mean(values_QG: Tensor, members_QG: Tensor) -> Tensor:
    """Return the mean over a group's members, (Q,)."""
    return (values_QG * members_QG).sum(dim=1) / members_QG.sum(dim=1).clamp(min=1)


def _clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def server_kl(groups: Sequence[Group], reading: Reading) -> float:
    """Return by how many nats a token a server found its own tokens likelier than `reading` does, 0 without any.

    On average over tokens this is KL(server || policy): rounding alone where both hold the same weights.
    """
    said = [one.drawn_logprobs or () for _, one in _reasoning(groups)]
    if not any(said):
        return 0.0
    ours_RT = reading.logprobs_RT.float().numpy(force=True)
    return float(
        np.concatenate([np.array(row) - ours_T[: len(row)] for row, ours_T in zip(said, ours_RT, strict=True)]).mean()
    )


def statistics(batch: RolloutBatch) -> dict[str, Tensor]:
    """Return what to log of a batch: each reward term, the reasoning rate, length, and the gap by task."""
    rollouts = [rollout for group in batch.groups for rollout in group]
    lengths = [len(rollout.token_ids) for rollout in rollouts if rollout.token_ids is not None]
    figures = {
        "reward": np.mean([scored.reward_G.mean() for scored in batch.scored]),
        "reward_adaptive": np.mean([scored.adaptive_G.mean() for scored in batch.scored]),
        "reward_well_formed": np.mean([scored.well_formed_G.mean() for scored in batch.scored]),
        "reward_embedding": np.mean([scored.embedding_G.mean() for scored in batch.scored]),
        "reasoning_rate": float(batch.old.decision_B2.softmax(dim=1)[:, 0].mean()),
        "rationale_tokens": np.mean(lengths) if lengths else 0.0,
        "server_kl": server_kl(batch.groups, batch.old),
    }
    for task in sorted({sample.question.task for sample in batch.samples}):
        gaps = [
            gap
            for sample, scored in zip(batch.samples, batch.scored, strict=True)
            if sample.question.task == task
            for gap in scored.gap_G[~np.isnan(scored.gap_G)]
        ]
        figures[f"gap_{task}"] = np.mean(gaps) if gaps else 0.0
    return {name: torch.tensor(float(value)) for name, value in figures.items()}
