"""The contrastive term of the joint objective (METHOD stage 3).

Axes: Q queries, C candidates, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    relevant_QC: Tensor,
    temperature: float,
    dims: Sequence[int],
    *,
    copies_Q: Tensor | None = None,
    copies_C: Tensor | None = None,
) -> Tensor:
    """Symmetric multi-positive InfoNCE, averaged over Matryoshka sizes; returns one loss per query and candidate.

    Each positive p of a query competes with the negatives alone, never with the other positives:

        loss = mean over p of -log( exp(s_p / T) / (exp(s_p / T) + sum over negatives n of exp(s_n / T)) )

    `copies_Q` and `copies_C` say how often each is there: its copies count as one negative together. In a batch of one
    task, few targets answer many questions. Counted each, one that m questions want has to stay T log m farther from
    every question that it does not answer, so that of two targets that answer a question as likely the rarer ranks
    first; where search holds each target once. None counts each.

    Inputs need not be normalised; similarities are cosines of the first `dim` values, in float32 whatever the inputs
    are: at T = .02, one step of a bfloat16 cosine is .2 nats. Queries and candidates without a positive contribute
    nothing. Returns a scalar.
    """
    queries_QD, candidates_CD = queries_QD.float(), candidates_CD.float()
    votes_Q, votes_C = (None if copies is None else copies.float().log() for copies in (copies_Q, copies_C))
    losses = []
    for dim in dims:
        similarity_QC = cosine(queries_QD[:, :dim], candidates_CD[:, :dim]) / temperature
        losses += [_directed(similarity_QC, relevant_QC, votes_C), _directed(similarity_QC.T, relevant_QC.T, votes_Q)]
    return torch.stack(losses).mean()


def _directed(similarity: Tensor, relevant: Tensor, votes: Tensor | None) -> Tensor:
    weighed = similarity if votes is None else similarity - votes
    negatives = weighed.masked_fill(relevant, -torch.inf).logsumexp(dim=1, keepdim=True)
    loss = F.softplus(negatives - similarity).masked_fill(~relevant, 0).sum(dim=1)
    positives = relevant.sum(dim=1)
    return (loss / positives.clamp(min=1)).sum() / (positives > 0).sum().clamp(min=1)


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Return the cosine of every row of `left` with every row of `right`."""
    return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T
