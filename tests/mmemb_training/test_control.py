"""Rewards are the formulas of METHOD, groups are paired, and the policy moves towards what is rewarded."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmemb_deploy import OptionError
from mmemb_training.checkpoint import Checkpoint, load_checkpoint
from mmemb_training.control.grpo import train_control
from mmemb_training.control.policy import RolloutBatch, chunks_of, policy_terms, read_alone
from mmemb_training.control.rewards import Rollout, advantages, score_group
from mmemb_training.control.rollouts import decisions, draw_groups
from mmemb_training.encoder import Encoder, Reading
from mmemb_training.nano.digits import Digits
from mmemb_training.recipes.settings import ALL_WEIGHTS, ControlRecipe, LoraSettings, Rewards, Schedule, TrainedWeights
from mmemb_training.selection.bank import TargetBank
from mmemb_training.selection.mining import mine_negatives

CANDIDATES_CD = np.eye(4, dtype=np.float32)
RECIPE = ControlRecipe(
    schedule=Schedule(steps=4, learning_rate=1e-3, warmup=1, save_every=2, spike=0), group=4, updates=2
)


def rollout(similarity: list[float], tokens: int | None, *, truncated: bool = False) -> Rollout:
    return Rollout(None if tokens is None else (5,) * tokens, np.array(similarity, np.float32), truncated)


def test_rewards_are_the_formulas_by_hand() -> None:
    rewards = Rewards(cost=0.2, sigma=0.5, well_formed=0.1, embedding=2.0, temperature=0.1)
    group = [
        rollout([0.8, 0.1, 0.0, 0.0], 10),
        rollout([0.3, 0.5, 0.0, 0.0], 40, truncated=True),
        rollout([0.4, 0.3, 0.2, 0.0], None),
    ]
    scored = score_group(group, CANDIDATES_CD, rewards, max_tokens=40)

    def s(own: float, others: list[float]) -> float:
        return own - 0.1 * float(np.log(np.exp(np.array(others) / 0.1).sum()))

    direct = s(0.4, [0.3, 0.2, 0.0])
    gaps = [s(0.8, [0.1, 0, 0]) - direct, s(0.3, [0.5, 0, 0]) - direct]
    assert scored.gap_G[:2] == pytest.approx(gaps, abs=1e-5)
    assert np.isnan(scored.gap_G[2])
    clipped = [float(np.clip(gap / 0.5, -1, 1)) for gap in gaps]
    stop = -float(np.clip(np.mean(gaps) / 0.5, -1, 1))
    assert scored.adaptive_G == pytest.approx([clipped[0] - 0.2 * 0.25, clipped[1] - 0.2, stop], abs=1e-5)
    assert scored.well_formed_G.tolist() == [1, 0, 1]
    assert scored.embedding_G == pytest.approx([0.7, 0, 0.1], abs=1e-6)  # the second's target is not on top
    expected = scored.adaptive_G + 0.1 * scored.well_formed_G + 2.0 * scored.embedding_G
    assert scored.reward_G == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [3, None])
def test_a_group_of_one_kind_knows_no_gap(tokens: int | None) -> None:
    group = [rollout([0.9, 0, 0, 0], tokens), rollout([0.1, 0.5, 0, 0], tokens)]
    scored = score_group(group, CANDIDATES_CD, Rewards(cost=0.0), max_tokens=10)
    assert scored.adaptive_G.tolist() == [0, 0]


def test_advantages_compare_members_alone() -> None:
    found = advantages(np.array([1, 2, 6, 100], np.float32), np.array([True, True, True, False]))
    assert found[3] == 0
    assert found[:3].mean() == pytest.approx(0, abs=1e-6)
    assert not advantages(np.ones(4, np.float32), np.ones(4, bool)).any()
    assert not advantages(np.array([1, 5], np.float32), np.array([True, False])).any()


def test_a_group_that_differs_by_noise_alone_pushes_no_harder_than_it_differs() -> None:
    everyone, noise_G = np.ones(3, bool), np.array([0.50, 0.51, 0.52], np.float32)
    assert np.abs(advantages(noise_G, everyone)).max() == pytest.approx(0.01, rel=1e-3)
    assert np.abs(advantages(noise_G, everyone, "standardised")).max() == pytest.approx(1.22, rel=1e-2)


def test_paired_groups_hold_both_kinds_and_force_only_where_they_must() -> None:
    rng = np.random.default_rng(0)
    think_Q = np.array([0.0, 1.0, 0.5, 0.02], np.float32)
    reasons_QG, forced_QG = decisions(think_Q, 8, rng, "paired")
    assert reasons_QG.any(axis=1).all()
    assert not reasons_QG.all(axis=1).any()
    assert forced_QG[:2].sum(axis=1).tolist() == [1, 1]
    assert not forced_QG[2].any()
    alone, forced = decisions(think_Q, 8, rng, "drawn")
    assert not alone[0].any()
    assert alone[1].all()
    assert not forced.any()


def test_expected_groups_hold_one_that_stops_whatever_the_policy_says() -> None:
    reasons_QG, forced_QG = decisions(np.array([0.0, 1.0], np.float32), 4, np.random.default_rng(0), "expected")
    assert reasons_QG.tolist() == [[False, True, True, True]] * 2
    assert forced_QG.all()


@pytest.fixture
def drawn(tiny: Checkpoint, digits: Digits) -> tuple[Any, TargetBank, RolloutBatch]:
    samples = mine_negatives(
        digits.samples[::6], TargetBank(digits.samples, tiny), tiny, hard=3, share_of_positive=None
    )
    bank = TargetBank(samples, tiny)
    groups = draw_groups(tiny, samples, size=4, kind="paired", max_tokens=9, seed=(0, 0))
    scored = [
        score_group(group, bank.candidates(sample), Rewards(), 9) for sample, group in zip(samples, groups, strict=True)
    ]
    chunks = chunks_of(samples, groups, tiny.rows, 3)
    reading = read_alone(Encoder(tiny).eval(), chunks)
    return samples, bank, RolloutBatch(samples, chunks, groups, scored, reading, reading)


def test_rollouts_carry_the_embedding_that_the_encoder_gives_them(drawn: Any, tiny: Checkpoint) -> None:
    _, _, batch = drawn
    reasoned = iter(torch.nn.functional.normalize(batch.old.reasoned_RD, dim=1).numpy())
    direct = torch.nn.functional.normalize(batch.old.direct_BD, dim=1).numpy()
    for index, group in enumerate(batch.groups):
        for one in group:
            expected = direct[index] if one.token_ids is None else next(reasoned)
            np.testing.assert_allclose(one.embedding_D, expected, atol=1e-4)
            assert one.token_ids is None or len(one.token_ids) <= 9
    ids = set(tiny.rows.prompt.ids.values())
    assert not any(set(one.token_ids or ()) & ids for group in batch.groups for one in group)


def test_the_policy_gradient_prefers_what_is_rewarded_and_skips_what_was_forced(drawn: Any, tiny: Checkpoint) -> None:
    samples, _, batch = drawn
    encoder = Encoder(tiny).eval()

    def loss_gradient(batch: RolloutBatch, recipe: ControlRecipe = RECIPE) -> torch.Tensor:
        reading = read_alone(encoder, chunks_of(samples, batch.groups, tiny.rows, 64))
        reading = Reading(*(part.detach().requires_grad_() for part in reading))
        terms = policy_terms(reading, batch, recipe)
        terms["policy_decision"].backward()
        assert reading.decision_B2.grad is not None
        return reading.decision_B2.grad

    def rewarded(batch: RolloutBatch, kind: bool) -> RolloutBatch:
        scored = [
            replace(
                one, reward_G=np.array([float((member.token_ids is not None) is kind) for member in group], np.float32)
            )
            for one, group in zip(batch.scored, batch.groups, strict=True)
        ]
        return replace(batch, scored=scored)

    free = replace(batch, groups=[[replace(one, forced=False) for one in group] for group in batch.groups])
    towards, away = loss_gradient(rewarded(free, True)), loss_gradient(rewarded(free, False))
    assert (towards[:, 0] < 0).all()  # descending raises the log-probability of `<think>`
    assert (away[:, 0] > 0).all()
    forced = replace(batch, groups=[[replace(one, forced=True) for one in group] for group in batch.groups])
    assert not loss_gradient(rewarded(forced, True)).any()
    # In expectation over both outcomes none needs to be drawn: the gradient of - p(reason) R(reason) - p(stop) R(stop).
    found = loss_gradient(rewarded(forced, True), replace(RECIPE, groups="expected"))
    p_Q = batch.old.decision_B2.softmax(dim=1)[:, 0]
    torch.testing.assert_close(found[:, 0], -p_Q * (1 - p_Q) / len(p_Q))


def test_control_trains_logs_every_term_and_resumes_bit_for_bit(
    drawn: Any, tiny_checkpoint: Path, tiny: Checkpoint, tmp_path: Path
) -> None:
    samples, bank, _ = drawn

    def run(checkpoint: Checkpoint, folder: Path, steps: int) -> list[dict[str, float]]:
        iterator = train_control(checkpoint, lambda turn: samples[turn : turn + 4], RECIPE, folder, bank=bank)
        return list(islice(iterator, steps))

    whole = run(tiny, tmp_path / "whole", 4)
    terms = {
        "policy_decision",
        "policy_rationale",
        "kl",
        "anchor",
        "reward_adaptive",
        "reward_well_formed",
        "reward_embedding",
        "reasoning_rate",
        "rationale_tokens",
        "norm_policy",
        "norm_anchor",
    }
    assert terms <= whole[0].keys()
    assert any(name.startswith("gap_") for name in whole[0])
    for name in ("kl", "anchor"):  # nothing has moved yet
        assert whole[0][name] == pytest.approx(0, abs=1e-5)
        assert whole[-1][name] > 1e-5
    run(load_checkpoint(tiny_checkpoint), tmp_path / "parts", 3)
    rest = run(load_checkpoint(tiny_checkpoint), tmp_path / "parts", 4)
    assert [row["step"] for row in rest] == [3, 4]
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[2:]]


def test_a_recipe_that_cannot_resume_is_refused() -> None:
    with pytest.raises(OptionError, match="save_every is 2: it must be a multiple of updates"):
        replace(RECIPE, updates=3)
    with pytest.raises(OptionError, match="cost is -1"):
        Rewards(cost=-1)


def test_questions_read_in_parts_and_layers_recomputed_give_the_same_run(
    drawn: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    samples, bank, _ = drawn
    losses = []
    for size, recomputed in ((None, False), (3, True)):
        recipe, weights = replace(RECIPE, micro_batch=size), TrainedWeights(gradient_checkpointing=recomputed)
        checkpoint, folder = load_checkpoint(tiny_checkpoint), tmp_path / str(size)
        run = train_control(checkpoint, lambda _: samples, recipe, folder, bank=bank, weights=weights)
        losses.append([row["loss"] for row in run])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # float32 sums, in another order, through four steps


def test_adapters_leave_the_reference_where_it_was(drawn: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    samples, bank, _ = drawn
    adapters = TrainedWeights(method="lora", lora=LoraSettings(rank=4))
    rows: dict[str, list[dict[str, float]]] = {}
    for one in (adapters, ALL_WEIGHTS):
        checkpoint, folder = load_checkpoint(tiny_checkpoint), tmp_path / one.method
        rows[one.method] = list(train_control(checkpoint, lambda _: samples, RECIPE, folder, bank=bank, weights=one))
    for name in ("kl", "anchor"):
        assert rows["lora"][0][name] == pytest.approx(0, abs=1e-5)
        assert rows["lora"][-1][name] > 0
    assert rows["lora"][0]["reward"] == pytest.approx(rows["full"][0]["reward"], abs=1e-5)
