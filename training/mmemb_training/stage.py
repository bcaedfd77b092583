"""What every stage that trains has in common: it is run once, watched, saved, and loaded where the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmemb_training.checkpoint import FACTS, Checkpoint, load_checkpoint
from mmemb_training.trainer import save_trained

Metrics = Iterator[dict[str, float]]
Watch = Callable[[str, Metrics, int], None]  # runs a stage's steps: its name, its metrics, how many there are


def finish_stage(
    folder: Path,
    checkpoint: Checkpoint,
    steps: Metrics,
    count: int,
    watch: Watch,
    accelerator: Accelerator,
    provenance: dict[str, Any],
    *,
    dtype: str = "float32",
) -> Checkpoint:
    """Run a stage's `count` steps and save what they made of `checkpoint`, unless that was done; return it, as loaded.

    The folder's name is the stage's; the checkpoint lies in `folder / "checkpoint"`.
    """
    target = folder / "checkpoint"
    if not (target / FACTS).exists():
        watch(folder.name, steps, count)
        stages = [*checkpoint.facts.provenance.get("stages", []), folder.name]
        save_trained(checkpoint, target, accelerator, {"stages": stages, **provenance})
    return load_checkpoint(target, dtype=dtype)
