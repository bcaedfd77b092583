"""What a rollout is worth, and how much better than its group's others (METHOD stage 4).

    s      = cos(q, t+) - tau logsumexp(cos(q, t-) / tau)            of a rollout's embedding
    delta  = s_reason - s_direct                                     the utility gap that reasoning opens
    R_ada  = clip(delta / sigma, -1, 1) - cost tokens / max_tokens   for a rollout that reasons
           = -clip(mean delta of the group / sigma, -1, 1)           for one that stops
    R      = R_ada + w_f well-formed + w_e embedding reward
    embedding reward = share of positives among the top * max(0, cos(q, t+) - max cos(q, t-))

Of the paper, R_ada and that it follows delta are known; the equations are ours. The gap is paired: it needs a rollout
of each kind. In a group that has one kind only, delta is unknown and counts as 0.
Axes: G rollouts of a group, D embedding size, C candidates of which the first is the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmemb_training.recipes.settings import Advantage, Rewards

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rollout:
    """One answer to a question: a rationale's token ids, or None where it stopped.

    A `forced` decision was not drawn from the policy, but put there to pair the group. `drawn_logprobs` is what a
    server says of the tokens it drew, with `</think>` where it drew that.
    """

    token_ids: tuple[int, ...] | None
    embedding_D: Floats
    truncated: bool = False
    forced: bool = False
    drawn_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Scored:
    """A group's rewards and the terms they are made of, (G,) each; the gap is nan where a rollout stopped."""

    reward_G: Floats
    adaptive_G: Floats
    well_formed_G: Floats
    embedding_G: Floats
    gap_G: Floats


def score_group(group: Sequence[Rollout], candidates_CD: Floats, rewards: Rewards, max_tokens: int) -> Scored:
    """Return the rewards of one group, whose target is the first of the candidates."""
    similarity_GC = np.stack([rollout.embedding_D for rollout in group]) @ candidates_CD.T
    own_G, others_GC = similarity_GC[:, 0], similarity_GC[:, 1:]
    reasons_G = np.array([rollout.token_ids is not None for rollout in group])
    s_G = own_G - rewards.temperature * _logsumexp(others_GC / rewards.temperature)
    paired = reasons_G.any() and not reasons_G.all()
    gap_G = np.where(reasons_G, s_G - s_G[~reasons_G].mean() if paired else 0.0, np.nan)
    share_G = np.array([len(rollout.token_ids or ()) / max_tokens for rollout in group])
    stops = -np.clip(gap_G[reasons_G].mean() / rewards.sigma, -1, 1) if paired else 0.0
    adaptive_G = np.where(reasons_G, np.clip(gap_G / rewards.sigma, -1, 1) - rewards.cost * share_G, stops)
    well_formed_G = np.array([not rollout.truncated for rollout in group], np.float64)
    margin_G = own_G - others_GC.max(axis=1)
    embedding_G = (margin_G > 0) * margin_G  # one positive: the top is the target or it is not
    reward_G = adaptive_G + rewards.well_formed * well_formed_G + rewards.embedding * embedding_G
    return Scored(*(part.astype(np.float32) for part in (reward_G, adaptive_G, well_formed_G, embedding_G, gap_G)))


def advantages(reward_G: Floats, members_G: NDArray[np.bool_], kind: Advantage = "centred") -> Floats:
    """Return R - mean over the members of a group, or (R - mean) / std where "standardised"; 0 for the others.

    0 for all where the members' rewards are equal, or there is only one.
    """
    chosen = reward_G[members_G]
    spread = chosen.std() if len(chosen) > 1 else 0.0
    if spread < 1e-6:
        return np.zeros_like(reward_G)
    scale = spread if kind == "standardised" else 1.0
    compared: Floats = np.where(members_G, (reward_G - chosen.mean()) / scale, 0).astype(np.float32)
    return compared


def _logsumexp(values_GC: Floats) -> Floats:
    top_G1 = values_GC.max(axis=1, keepdims=True)
    total_G: Floats = (np.log(np.exp(values_GC - top_G1).sum(axis=1)) + top_G1[:, 0]).astype(np.float32)
    return total_G
