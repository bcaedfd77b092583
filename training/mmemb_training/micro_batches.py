"""How many questions a process reads at once: as many as a recipe says, or as fit the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmemb_deploy.devices import GIB
from mmemb_deploy.errors import OptionError
from mmemb_training.recipes.estimate import estimate
from mmemb_training.recipes.machines import Machine
from mmemb_training.recipes.settings import RunRecipe, changed
from mmemb_training.recipes.shapes import ModelShape

CPU_MICRO_BATCH = 8  # questions that a process reads at once where there is no GPU, whose memory could be asked for


def machine_here(gpus: int) -> Machine | None:
    """Return the GPUs that `gpus` processes train on, None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Machine(name=found.name, source="this machine", memory_gib=found.total_memory / GIB, gpus=gpus)


def with_micro_batches(
    recipe: RunRecipe, shape: ModelShape, machine: Machine | None, stages: Sequence[str], say: Callable[[str], None]
) -> RunRecipe:
    """Return the recipe with a micro batch for each of the stages that train: its own, or what fits the machine.

    Without a GPU, and without its own, that is CPU_MICRO_BATCH. Raises OptionError for a stage that cannot fit, naming
    the changes after which it does.
    """
    made = None if machine is None else estimate(shape, recipe, machine)
    for stage in stages:
        settings: Any = getattr(recipe, stage)
        memory = None if made is None else made.stages[stage]
        size: int = settings.micro_batch or CPU_MICRO_BATCH
        if settings.micro_batch is not None:
            why = "as the recipe says" + (f", although {memory.reason()}" if memory and not memory.fits else "")
        elif memory is None:
            why = "as there is no GPU whose memory they could fill"
        elif memory.fits:
            size, why = memory.micro_batch, f"as fit into {memory.usable / GIB:.1f} GiB"
        else:
            raise OptionError(f"{memory.reason()}. It fits with {', or with '.join(made.changes if made else ())}")
        say(f"{stage}: {size} questions at once, {why}")
        recipe = changed(recipe, f"{stage}.micro_batch", size)
    return recipe
