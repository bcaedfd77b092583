"""GRPO on the decision and on the rationale, in paired groups (METHOD stage 4).

    policy   = - mean of min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) over decisions, and over words
    L        = policy + beta KL(policy || reference) + anchor * mean of 1 - cos(z, z of the reference), both embeddings

Decision and words are normalised apart, as in Thinkless (arXiv 2505.13379): one control token would drown among the
words. The decision's advantage compares all rollouts of a group; the words' those that reason, so that bad words earn
nothing for a good decision. A forced decision takes no policy gradient; the words after it do. Targets and negatives
are those of a frozen snapshot, and `anchor` keeps the embeddings where stage 3 left them, on the policy's own
rationales: reinforcement learns when to reason and what to write, not what a rationale means. InfoNCE in its place
was tried, and taught the reasoned embedding to distrust rationales, since some that are drawn are wrong.

TRL's GRPOTrainer was judged first and does not serve: its rewards are functions of decoded text, where ours come from
the policy's own embedding at `<|gen_emb|>`; it cannot force one token of a group without a gradient; and it has no
place for a second normalisation or for the anchor. What would remain of it is a loop, and `loop.run_steps` is one.
Axes: Q questions, R rollouts that reason, T words, D embedding size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from mmemb_deploy.errors import OptionError
from mmemb_deploy.rows import Row
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.control.rewards import Rewards, Rollout, Scored, advantages, score_group
from mmemb_training.control.rollouts import Group, draw_groups
from mmemb_training.encoder import Encoder, Path, Reading
from mmemb_training.loop import Schedule, run_steps
from mmemb_training.samples import Sample, query_row
from mmemb_training.selection.bank import TargetBank
from mmemb_training.trainer import plain_accelerator

Draw = Callable[[int], list[Sample]]  # the questions of a batch of rollouts, a function of its number
DrawGroups = Callable[..., list[Group]]


@dataclass(frozen=True, kw_only=True)
class ControlRecipe:
    """How adaptive control is learnt."""

    schedule: Schedule
    rewards: Rewards = field(default_factory=Rewards)
    group: int = 8  # rollouts of a question
    updates: int = 2  # steps on each batch of rollouts; the second and later ones are clipped
    clip: float = 0.2
    beta: float = 0.04  # of the KL to the model that stage 3 left
    anchor: float = 10.0
    paired: bool = True  # every group holds a rollout of each kind
    log_norms_every: int = 10  # steps between measurements of each term's gradient norm

    def __post_init__(self) -> None:
        if self.group < 2:
            raise OptionError(f"group is {self.group}: a group needs at least 2 rollouts to compare")
        if self.schedule.save_every % self.updates:
            raise OptionError(
                f"save_every is {self.schedule.save_every}: it must be a multiple of updates ({self.updates}), so that "
                f"a resumed run begins with fresh rollouts"
            )


@dataclass(frozen=True)
class Batch:
    """Rollouts of some questions, scored, with the log-probabilities of the policy that drew them."""

    samples: Sequence[Sample]
    groups: Sequence[Group]
    scored: Sequence[Scored]
    old: Reading
    reference: Reading


def train_control(
    checkpoint: Checkpoint,
    draw: Draw,
    recipe: ControlRecipe,
    folder: FilePath,
    *,
    bank: TargetBank,
    data: Any = None,
    draw_rollouts: DrawGroups = draw_groups,
    accelerator: Accelerator | None = None,
) -> Iterator[dict[str, float]]:
    """Train a checkpoint's model in place, yielding every step's metrics; an unfinished run in `folder` goes on.

    The samples that `draw` returns carry hard negatives, which `bank` embedded with the model as stage 3 left it.
    Raises OptionError if the folder holds another run, TrainingError for a loss that is not finite.
    """
    accelerator = accelerator or plain_accelerator()
    reference = Encoder(_frozen(checkpoint)).eval()
    torch.manual_seed(recipe.schedule.seed)
    model = Encoder(checkpoint).train()
    encoder, optimizer = accelerator.prepare(model, recipe.schedule.optimizer(model))
    batch: Batch | None = None

    def step_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal batch
        if batch is None or step % recipe.updates == 0:
            turn = step // recipe.updates
            seed = (recipe.schedule.seed, turn)
            batch = _roll_out(checkpoint, draw(turn), recipe, bank, reference, encoder, draw_rollouts, seed)
        terms = _terms(encoder(*_inputs(checkpoint, batch.samples, batch.groups)), batch, recipe)
        policy = terms["policy_decision"] + terms["policy_words"] + recipe.beta * terms["kl"]
        loss = policy + recipe.anchor * terms["anchor"]
        logged = {name: term.detach() for name, term in terms.items()} | _statistics(batch)
        if step % recipe.log_norms_every == 0:
            logged |= _gradient_norms({"policy": policy, "anchor": recipe.anchor * terms["anchor"]}, model)
        accelerator.backward(loss)
        return loss.detach(), logged

    identity = {"recipe": asdict(recipe), "data": data}
    yield from run_steps(
        folder, identity, recipe.schedule, accelerator, encoder, optimizer, step_of,
        lambda step: [sample.question.key for sample in draw(step // recipe.updates)],
    )  # fmt: skip
    checkpoint.model.eval()


def _frozen(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, model=copy.deepcopy(checkpoint.model).requires_grad_(False))


def _roll_out(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    recipe: ControlRecipe,
    bank: TargetBank,
    reference: Encoder,
    encoder: Any,
    draw_rollouts: DrawGroups,
    seed: tuple[int, int],
) -> Batch:
    """Draw and score the groups of some questions, and note what policy and reference thought of them."""
    max_tokens = checkpoint.facts.max_rationale_tokens
    groups = draw_rollouts(
        checkpoint, samples, size=recipe.group, paired=recipe.paired, max_tokens=max_tokens, seed=seed
    )
    scored = [
        score_group(group, bank.candidates(sample), recipe.rewards, max_tokens)
        for sample, group in zip(samples, groups, strict=True)
    ]
    rows, paths = _inputs(checkpoint, samples, groups)
    with torch.no_grad():
        return Batch(samples, groups, scored, encoder(rows, paths), reference(rows, paths))


def _inputs(checkpoint: Checkpoint, samples: Sequence[Sample], groups: Sequence[Group]) -> tuple[list[Row], list[Path]]:
    rows = [query_row(sample.question, checkpoint.rows) for sample in samples]
    return rows, [Path(place, rollout.words) for place, rollout in _reasoning(groups) if rollout.words is not None]


def _reasoning(groups: Sequence[Group]) -> list[tuple[int, Rollout]]:
    """Return the rollouts that reason, with their questions' places, in the order of the encoder's paths."""
    return [(place, rollout) for place, group in enumerate(groups) for rollout in group if rollout.words is not None]


def _terms(reading: Reading, batch: Batch, recipe: ControlRecipe) -> dict[str, Tensor]:
    """Return the terms of the loss."""
    device = reading.direct_BD.device
    reasons_QG = torch.tensor([[one.words is not None for one in group] for group in batch.groups], device=device)
    drawn_QG = torch.tensor([[not one.forced for one in group] for group in batch.groups], device=device)
    everyone = np.ones(recipe.group, bool)
    whole_QG = torch.tensor(
        np.stack([advantages(scored.reward_G, everyone) for scored in batch.scored]), device=device
    )  # fmt: skip
    among_QG = torch.tensor(
        np.stack([advantages(scored.reward_G, ~np.isnan(scored.gap_G)) for scored in batch.scored]), device=device
    )
    logp, old, reference = (part.decision_B2.log_softmax(dim=1) for part in (reading, batch.old, batch.reference))
    action_QG = (~reasons_QG).long()
    decided_QG = _clipped(logp.gather(1, action_QG) - old.gather(1, action_QG), whole_QG, recipe.clip)
    kl_Q = (logp.exp() * (logp - reference)).sum(dim=1)

    states = (torch.cat((part.direct_BD, part.reasoned_RD)) for part in (reading, batch.reference))
    drift = 1 - F.cosine_similarity(*states, dim=1)
    terms = {
        "policy_decision": -(decided_QG * drawn_QG).sum() / drawn_QG.sum().clamp(min=1),
        "policy_words": reading.words_RT.sum() * 0.0,
        "kl": kl_Q.mean(),
        "anchor": drift.mean(),
    }
    if reading.words_RT.numel():
        spoken_RT = _spoken(batch, reading.words_RT)
        count = spoken_RT.sum().clamp(min=1)
        gained_RT = _clipped(reading.words_RT - batch.old.words_RT, among_QG[reasons_QG][:, None], recipe.clip)
        behind_RT = batch.reference.words_RT - reading.words_RT
        terms["policy_words"] = -(gained_RT * spoken_RT).sum() / count
        terms["kl"] = terms["kl"] + ((behind_RT.exp() - behind_RT - 1) * spoken_RT).sum() / count
    return terms


def _spoken(batch: Batch, words_RT: Tensor) -> Tensor:
    """Return which words were drawn, (R, T): all and `</think>`, but for a `</think>` that the token limit forced."""
    drawn_R = [len(one.words or ()) + (not one.truncated) for _, one in _reasoning(batch.groups)]
    places_T = torch.arange(words_RT.shape[1], device=words_RT.device)
    return places_T < torch.tensor(drawn_R, device=words_RT.device)[:, None]


def _clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def _statistics(batch: Batch) -> dict[str, Tensor]:
    """Return what to log of a batch: each reward term, the reasoning rate, length, and the gap by task."""
    rollouts = [rollout for group in batch.groups for rollout in group]
    drawn = [rollout for rollout in rollouts if not rollout.forced]
    lengths = [len(rollout.words) for rollout in rollouts if rollout.words is not None]
    figures = {
        "reward": np.mean([scored.reward_G.mean() for scored in batch.scored]),
        "reward_adaptive": np.mean([scored.adaptive_G.mean() for scored in batch.scored]),
        "reward_well_formed": np.mean([scored.well_formed_G.mean() for scored in batch.scored]),
        "reward_embedding": np.mean([scored.embedding_G.mean() for scored in batch.scored]),
        "reasoning_rate": np.mean([rollout.words is not None for rollout in drawn]) if drawn else 0.0,
        "rationale_tokens": np.mean(lengths) if lengths else 0.0,
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


def _gradient_norms(parts: dict[str, Tensor], model: Encoder) -> dict[str, Tensor]:
    """Return the gradient norm of each part of the loss: they share weights, and may pull apart."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    norms = {}
    for name, part in parts.items():
        gradients = torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True)
        norms[f"norm_{name}"] = torch.stack([found.norm() for found in gradients if found is not None]).norm()
    return norms
