"""Rollouts: groups of answers to one question, drawn from the policy as it is.

Our own runtime draws them (the same decoding as in a bundle); for real sizes an inference server writes the rationales.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.prompts import END_THINK
from mmemb_deploy.routing.generation import Choose
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.control.rewards import Rollout
from mmemb_training.recipes.settings import Groups
from mmemb_training.runtime import torch_embedder
from mmemb_training.samples import Sample, query_row

Group = list[Rollout]


def decisions(
    think_Q: Floats, size: int, rng: np.random.Generator, groups: Groups
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw who reasons from the policy's probabilities (Q,); return decisions and which were forced, (Q, size) each.

    A "paired" group that would hold one kind only gets its last rollout of the other kind, by force. In an "expected"
    one all is forced: the first stops, as one direct embedding is like another, and the others reason.
    """
    if groups == "expected":
        reasons_QG = np.ones((len(think_Q), size), bool)
        reasons_QG[:, 0] = False
        return reasons_QG, np.ones_like(reasons_QG)
    reasons_QG = rng.random((len(think_Q), size)) < think_Q[:, None]
    forced_QG = np.zeros_like(reasons_QG)
    if groups == "paired":
        alike_Q = reasons_QG.all(axis=1) | ~reasons_QG.any(axis=1)
        reasons_QG[alike_Q, -1] ^= True
        forced_QG[alike_Q, -1] = True
    return reasons_QG, forced_QG


def draw_groups(
    checkpoint: Checkpoint, samples: Sequence[Sample], *, size: int, kind: Groups, max_tokens: int, seed: Sequence[int]
) -> list[Group]:
    """Return `size` rollouts of every question, sampled at temperature 1 from the checkpoint's weights as they are."""
    rng = np.random.default_rng(seed)
    paths = torch_embedder(checkpoint).paths
    fast = paths.fast_path.run([query_row(sample.question, checkpoint.rows) for sample in samples])
    reasons_QG, forced_QG = decisions(fast.scores_B, size, rng, kind)
    owners, members = np.nonzero(reasons_QG)
    markers = checkpoint.rows.prompt.ids
    never = [token for marker, token in markers.items() if marker != END_THINK]
    groups = [
        [Rollout(None, embedding_D, forced=bool(forced)) for forced in forced_G]
        for embedding_D, forced_G in zip(fast.embeddings_BD, forced_QG, strict=True)
    ]
    if not len(owners):
        return groups
    assert fast.cache is not None
    written = paths.generator.generate([fast.cache.take(owners.tolist())], max_tokens, sampling(rng, never))
    for owner, member, reasoned in zip(owners, members, written, strict=True):
        forced = bool(forced_QG[owner, member])
        token_ids = tuple(reasoned.token_ids)
        groups[owner][member] = Rollout(token_ids, reasoned.embedding_D, reasoned.truncated, forced)
    return groups


def sampling(rng: np.random.Generator, never: Sequence[int]) -> Choose:
    """Return a choice that samples at temperature 1, and never the tokens `never` (Gumbel-max)."""

    def choose(logits_BW: Floats) -> Ints:
        noisy_BW = logits_BW + rng.gumbel(size=logits_BW.shape)
        noisy_BW[:, list(never)] = -np.inf
        chosen: Ints = noisy_BW.argmax(axis=1)
        return chosen

    return choose
