"""Joint training (METHOD stage 3) of a checkpoint: one trainer for the nano model and for 4B, one process or many.

accelerate brings DDP, FSDP2 and bf16; peft brings LoRA; the step is `joint.JointStep`, the loop `loop.run_steps`. Every
process draws the same lessons and takes its share of them, whose images it decodes while the step before runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmemb_training.ahead import Ahead
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.encoder import Encoder
from mmemb_training.grad_cache import backward
from mmemb_training.joint import JointStep, Lesson
from mmemb_training.loop import run_steps
from mmemb_training.lora import trainable
from mmemb_training.recipes.settings import ALL_WEIGHTS, JointRecipe, TrainedWeights
from mmemb_training.stage import plain_accelerator

Draw = Callable[[int], Sequence[Lesson]]  # the lessons of a step, a function of its number alone


def train_jointly(
    checkpoint: Checkpoint,
    draw: Draw,
    recipe: JointRecipe,
    folder: Path,
    *,
    weights: TrainedWeights = ALL_WEIGHTS,
    data: Any = None,
    accelerator: Accelerator | None = None,
) -> Iterator[dict[str, float]]:
    """Train a checkpoint's model in place, yielding every step's metrics; an unfinished run in `folder` goes on.

    `data` names, in JSON, what `draw` draws from. Writing the trained checkpoint is the caller's. Raises OptionError if
    the folder holds another run, TrainingError for a loss that is not finite or a spike.
    """
    accelerator = accelerator or plain_accelerator()
    processes, chunks = accelerator.num_processes, recipe.chunks(accelerator.num_processes)
    torch.manual_seed(recipe.schedule.seed)

    def share_of(step: int) -> JointStep:
        return JointStep(
            draw(step)[accelerator.process_index :: processes],
            checkpoint.rows,
            recipe.objective,
            hard_negatives=recipe.hard_negatives,
            query_chunks=max(chunks, recipe.length_groups),
            target_chunks=chunks,
        )

    shares = Ahead(share_of, recipe.schedule.length)

    def step_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        share = shares(step)
        cached = chunks > 1 or processes > 1
        _, terms = backward(
            encoder, share.chunks, lambda readings: share.loss(readings, accelerator), accelerator, cached=cached
        )
        return recipe.objective.total(terms), terms

    def describe(step: int) -> list[dict[str, Any]]:
        return [
            {"question": lesson.sample.question.key, "task": lesson.sample.question.task, "rationale": lesson.rationale}
            for lesson in draw(step)
        ]

    identity = {"recipe": asdict(replace(recipe, micro_batch=None)), "weights": asdict(weights), "data": data}
    with trainable(checkpoint, weights):
        model = Encoder(checkpoint).train()
        encoder, optimizer = accelerator.prepare(model, recipe.schedule.optimizer(model))
        yield from run_steps(folder, identity, recipe.schedule, accelerator, encoder, optimizer, step_of, describe)
