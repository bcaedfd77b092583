"""GRPO on the decision and on the rationale, in paired groups (METHOD stage 4).

    policy   = - mean of min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) over decisions, and over tokens of rationales
    L        = policy + beta KL(policy || reference) + anchor * mean of 1 - cos(z, z of the reference), both embeddings

Decision and rationale are normalised apart, as in Thinkless (arXiv 2505.13379): one control token would drown among
the others. The decision's advantage compares all rollouts of a group; the rationale's those that reason, so that a bad
one earns nothing for a good decision. A forced decision takes no policy gradient; what follows it does. In "expected"
groups, where all are forced, the decision has two outcomes whose worth is known, and its term is the expectation
itself: - p(reason) mean R of those that reason - p(stop) R of the one that stops.

Targets and negatives are those of a frozen snapshot, and `anchor` keeps the embeddings where stage 3 left them, on the
policy's own rationales: reinforcement learns when to reason and what to write, not what a rationale means. InfoNCE in
its place was tried, and taught the reasoned embedding to distrust rationales, since some that are drawn are wrong.

Settings of the paper are not known; UME-R1 has groups of 8, KL .04 and clips at 1.28, Embed-RL 4 and .01. Groups are
paired by force, decision and rationale weighed apart, and embeddings anchored: ours.

TRL's GRPOTrainer (1.16) was read first. Its experimental `rollout_func` could draw these groups, mask a forced token
and hand embeddings to its rewards; but every token of a rollout shares one advantage there, the loss has no place for
the anchor, and a prompt with its images is read again for each of its rollouts. Drawing, scoring and loss would all
be ours; what would remain is a loop, and `loop.run_steps` is one.
Axes: Q questions, R rollouts that reason, T tokens, D embedding size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmemb_training.checkpoint import Checkpoint
from mmemb_training.control.policy import RolloutBatch, chunks_of, merged, policy_terms, read_alone, statistics
from mmemb_training.control.publish import Publisher, client_of
from mmemb_training.control.rewards import score_group
from mmemb_training.control.rollouts import Group, draw_groups
from mmemb_training.control.served import ServedRollouts
from mmemb_training.encoder import Encoder, Reading
from mmemb_training.grad_cache import Chunk, backward
from mmemb_training.loop import run_steps
from mmemb_training.lora import trainable, without_lora
from mmemb_training.recipes.settings import ALL_WEIGHTS, ControlRecipe, TrainedWeights
from mmemb_training.samples import Sample
from mmemb_training.selection.bank import TargetBank
from mmemb_training.stage import plain_accelerator

Draw = Callable[[int], Sequence[Sample]]  # the questions of a batch of rollouts, a function of its number
Drawn = tuple[list[Group], list[Chunk], Reading]  # rollouts, what the encoder reads of them, and what it read
DrawRollouts = Callable[[Any, Sequence[Sample], Sequence[int]], Drawn]  # of encoder, samples and seed


def train_control(
    checkpoint: Checkpoint,
    draw: Draw,
    recipe: ControlRecipe,
    folder: Path,
    *,
    bank: TargetBank,
    weights: TrainedWeights = ALL_WEIGHTS,
    data: Any = None,
    accelerator: Accelerator | None = None,
) -> Iterator[dict[str, float]]:
    """Train a checkpoint's model in place, yielding every step's metrics; an unfinished run in `folder` goes on.

    The samples that `draw` returns carry hard negatives, which `bank` embedded with the model as stage 3 left it.
    Raises OptionError if the folder holds another run, TrainingError for a loss that is not finite, BackendError where
    the server of `recipe.rollouts` fails.
    """
    accelerator = accelerator or plain_accelerator()
    torch.manual_seed(recipe.schedule.seed)
    batch: RolloutBatch | None = None

    def roll_out(turn: int) -> RolloutBatch:
        samples, limit = draw(turn), checkpoint.facts.max_rationale_tokens
        groups, chunks, old = draw_rollouts(encoder, samples, (recipe.schedule.seed, turn, accelerator.process_index))
        scored = [
            score_group(group, bank.candidates(sample), recipe.rewards, limit)
            for sample, group in zip(samples, groups, strict=True)
        ]
        return RolloutBatch(samples, chunks, groups, scored, old, read_reference(chunks))

    def step_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal batch
        if batch is None or step % recipe.updates == 0:
            batch = roll_out(step // recipe.updates)
        drawn, chunks = batch, batch.chunks

        def loss_of(readings: Sequence[Reading]) -> tuple[Tensor, dict[str, Tensor]]:
            terms = policy_terms(merged(readings), drawn, recipe)
            parts = {
                "policy": terms["policy_decision"] + terms["policy_rationale"] + recipe.beta * terms["kl"],
                "anchor": recipe.anchor * terms["anchor"],
            }
            logged = {name: term.detach() for name, term in terms.items()} | statistics(drawn)
            if len(chunks) == 1 and step % recipe.log_norms_every == 0:
                logged |= _gradient_norms(parts, model)
            # `backward` adds processes up, and each has its own mean.
            return (parts["policy"] + parts["anchor"]) / accelerator.num_processes, logged

        return backward(encoder, chunks, loss_of, accelerator, cached=len(chunks) > 1)

    def describe(step: int) -> list[str]:
        return [sample.question.key for sample in draw(step // recipe.updates)]

    own = asdict(replace(recipe, micro_batch=None, rollouts=None))  # a run may go on with another server
    identity = {"recipe": own, "weights": asdict(weights), "data": data}
    with trainable(checkpoint, weights, markers=False) as adapter:  # which stage 3 taught, and no server would follow
        draw_rollouts = _drawing(checkpoint, adapter, recipe, folder, accelerator)
        read_reference = _reference(checkpoint, adapter)
        model = Encoder(checkpoint).train()
        encoder, optimizer = accelerator.prepare(model, recipe.schedule.optimizer(model))
        yield from run_steps(folder, identity, recipe.schedule, accelerator, encoder, optimizer, step_of, describe)


def _drawing(
    checkpoint: Checkpoint, adapter: Any, recipe: ControlRecipe, folder: Path, accelerator: Accelerator
) -> DrawRollouts:
    """Return what draws rollouts from the weights as they are: here, or on a server that is brought up to date."""
    if recipe.rollouts is not None:
        client = client_of(recipe.rollouts)
        publisher = Publisher(checkpoint, adapter, client, folder, accelerator)
        served = ServedRollouts(checkpoint, client, recipe, accelerator)
        return lambda encoder, samples, seed: served.draw(encoder, samples, publisher.publish(), seed)
    limit = checkpoint.facts.max_rationale_tokens

    def draw(encoder: Any, samples: Sequence[Sample], seed: Sequence[int]) -> Drawn:
        groups = draw_groups(checkpoint, samples, size=recipe.group, kind=recipe.groups, max_tokens=limit, seed=seed)
        chunks = chunks_of(samples, groups, checkpoint.rows, recipe.micro_batch)
        return groups, chunks, read_alone(encoder, chunks)

    return draw


def _reference(checkpoint: Checkpoint, adapter: Any) -> Callable[[Sequence[Chunk]], Reading]:
    """Return what reads with the weights as stage 3 left them: a frozen copy, or the model without its adapters."""
    if adapter is None:
        frozen = Encoder(replace(checkpoint, model=copy.deepcopy(checkpoint.model).requires_grad_(False))).eval()
        return lambda chunks: read_alone(frozen, chunks)
    bare = Encoder(checkpoint)

    def read(chunks: Sequence[Chunk]) -> Reading:
        with without_lora(adapter):
            return read_alone(bare, chunks)

    return read


def _gradient_norms(parts: dict[str, Tensor], model: Encoder) -> dict[str, Tensor]:
    """Return the gradient norm of each part of the loss: they share weights, and may pull apart."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    norms = {}
    for name, part in parts.items():
        gradients = torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        norms[f"norm_{name}"] = torch.stack([found.norm() for found in gradients]).norm()
    return norms
