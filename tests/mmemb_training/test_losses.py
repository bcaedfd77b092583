"""The joint objective's terms, against slow loops and cases worked by hand."""

import math

import torch
from torch import Tensor

from mmemb_training.losses import cosine, info_nce


def slow_info_nce(queries: Tensor, candidates: Tensor, relevant: Tensor, temperature: float, dim: int) -> float:
    """The formula of `info_nce`, one exponential at a time."""
    similarity = cosine(queries[:, :dim], candidates[:, :dim]) / temperature
    directions = []
    for scores, right in ((similarity, relevant), (similarity.T, relevant.T)):
        losses = []
        for row, positives in zip(scores.tolist(), right.tolist(), strict=True):
            negatives = sum(math.exp(score) for score, positive in zip(row, positives, strict=True) if not positive)
            own = [
                -math.log(math.exp(score) / (math.exp(score) + negatives))
                for score, positive in zip(row, positives, strict=True)
                if positive
            ]
            if own:
                losses.append(sum(own) / len(own))
        directions.append(sum(losses) / len(losses))
    return sum(directions) / 2


def test_info_nce_equals_its_formula_over_all_sizes() -> None:
    torch.manual_seed(0)
    queries, candidates = torch.randn(4, 8), torch.randn(6, 8)
    relevant = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    expected = sum(slow_info_nce(queries, candidates, relevant, 0.5, dim) for dim in (8, 4)) / 2
    assert math.isclose(info_nce(queries, candidates, relevant, 0.5, (8, 4)).item(), expected, rel_tol=1e-5)


def test_info_nce_of_half_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    queries, candidates, relevant = torch.randn(6, 32).bfloat16(), torch.randn(6, 32).bfloat16(), torch.eye(6).bool()
    found = info_nce(queries, candidates, relevant, 0.02, (32, 16))
    assert found.dtype == torch.float32
    assert found == info_nce(queries.float(), candidates.float(), relevant, 0.02, (32, 16))


def test_info_nce_falls_as_a_query_nears_its_target() -> None:
    candidates, relevant = torch.eye(3), torch.eye(3).bool()
    near, far = torch.eye(3) + 0.1, torch.eye(3) + 0.9
    assert info_nce(near, candidates, relevant, 0.1, (3,)) < info_nce(far, candidates, relevant, 0.1, (3,))


def test_copies_of_questions_and_targets_change_nothing() -> None:
    torch.manual_seed(0)
    queries, candidates = torch.randn(4, 8), torch.randn(6, 8)
    relevant = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    expected = info_nce(queries, candidates, relevant, 0.5, (8,))
    twice, thrice = torch.arange(4).repeat(2), torch.arange(6).repeat(3)
    copied = queries[twice], candidates[thrice], relevant[twice][:, thrice], 0.5, (8,)
    found = info_nce(*copied, copies_Q=torch.full((8,), 2), copies_C=torch.full((18,), 3))
    torch.testing.assert_close(found, expected)
    assert info_nce(*copied) > expected + 0.2
