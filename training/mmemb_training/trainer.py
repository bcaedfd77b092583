"""Joint training (METHOD stage 3) of a checkpoint: one trainer for the nano model and for 4B, one process or many.

accelerate brings DDP, FSDP2 and bf16; peft brings LoRA; the step is `joint.JointStep`, the loop `loop.run_steps`. Every
process draws the same lessons and takes its share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mmemb_deploy.errors import OptionError
from mmemb_training.checkpoint import Checkpoint, save_checkpoint
from mmemb_training.encoder import Encoder
from mmemb_training.grad_cache import backward
from mmemb_training.joint import JointStep, Lesson, Objective
from mmemb_training.loop import Schedule, run_steps
from mmemb_training.lora import LoraSettings, add_lora, merge_lora
from mmemb_training.model import checkpoint_layers

Draw = Callable[[int], list[Lesson]]  # the lessons of a step, a function of its number alone


@dataclass(frozen=True, kw_only=True)
class JointRecipe:
    """How a model is trained jointly, and towards what."""

    schedule: Schedule
    objective: Objective
    query_chunks: int = 1  # of each process's lessons; each chunk is padded to its longest prompt
    target_chunks: int = 1
    grad_cache: bool = False  # hold one chunk's activations at a time; always so over several processes
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None  # None trains all weights

    def __post_init__(self) -> None:
        for name in ("query_chunks", "target_chunks"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}: it must be at least 1")


def train_jointly(
    checkpoint: Checkpoint,
    draw: Draw,
    recipe: JointRecipe,
    folder: Path,
    *,
    data: Any = None,
    accelerator: Accelerator | None = None,
) -> Iterator[dict[str, float]]:
    """Train a checkpoint's model in place, yielding every step's metrics; an unfinished run in `folder` goes on.

    `data` names, in JSON, what `draw` draws from. Writing the trained checkpoint is the caller's. Raises OptionError if
    the folder holds another run, TrainingError for a loss that is not finite or a spike.
    """
    accelerator = accelerator or plain_accelerator()
    torch.manual_seed(recipe.schedule.seed)
    adapter = None if recipe.lora is None else add_lora(checkpoint, recipe.lora)
    if recipe.gradient_checkpointing:
        checkpoint_layers(checkpoint.model)
    model = Encoder(checkpoint).train()
    encoder, optimizer = accelerator.prepare(model, recipe.schedule.optimizer(model))

    def step_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        share = JointStep(
            draw(step)[accelerator.process_index :: accelerator.num_processes],
            checkpoint.rows,
            recipe.objective,
            query_chunks=recipe.query_chunks,
            target_chunks=recipe.target_chunks,
        )
        cached = recipe.grad_cache or accelerator.num_processes > 1
        _, terms = backward(
            encoder, share.chunks, lambda readings: share.loss(readings, accelerator), accelerator, cached=cached
        )
        return recipe.objective.total(terms), terms

    def describe(step: int) -> list[dict[str, Any]]:
        return [
            {"question": lesson.sample.question.key, "task": lesson.sample.question.task, "rationale": lesson.rationale}
            for lesson in draw(step)
        ]

    identity = {"recipe": asdict(recipe), "data": data}
    yield from run_steps(folder, identity, recipe.schedule, accelerator, encoder, optimizer, step_of, describe)
    checkpoint.model.eval()
    if adapter is not None:
        merge_lora(adapter)


def plain_accelerator() -> Accelerator:
    """Return an accelerator for one process, on the first GPU where there is one."""
    return Accelerator(cpu=not torch.cuda.is_available())


def save_trained(
    checkpoint: Checkpoint, folder: Path, accelerator: Accelerator, provenance: dict[str, Any] | None = None
) -> None:
    """Write what was trained, from one process, with sharded weights gathered."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(checkpoint.model, options=options)
    if accelerator.is_main_process:
        save_checkpoint(checkpoint, folder, provenance=provenance, weights=weights)
    accelerator.wait_for_everyone()
