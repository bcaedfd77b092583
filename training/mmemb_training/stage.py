"""What every stage that trains has in common: it is run once, watched, saved, and loaded where the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from mmemb_deploy.files import claim
from mmemb_training.checkpoint import FACTS, Checkpoint, load_checkpoint, save_checkpoint

Metrics = Iterator[dict[str, float]]
Watch = Callable[[str, Metrics, int], None]  # runs a stage's steps: its name, its metrics, how many there are


def plain_accelerator() -> Accelerator:
    """Return an accelerator for one process, on the first GPU where there is one."""
    return Accelerator(cpu=not torch.cuda.is_available())


def sharding(precision: str) -> FullyShardedDataParallelPlugin:
    """Return how FSDP2 shards a model's layers, with "bf16" for `precision` computing in it.

    Gradients are then added up in float32, and what a layer returns keeps its dtype: log-probabilities are float32, and
    a loss over temperature .02 must not see them rounded.
    """
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",  # each process writes its own part of a state
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3VLTextDecoderLayer"],
        mixed_precision_policy=half if precision == "bf16" else None,
    )


def save_trained(
    checkpoint: Checkpoint, folder: Path, accelerator: Accelerator, provenance: dict[str, Any] | None = None
) -> None:
    """Write what was trained, from one process."""
    save_checkpoint(checkpoint, folder, provenance=provenance, writes=accelerator.is_main_process)
    accelerator.wait_for_everyone()


def run_stage(
    folder: Path,
    begin: Callable[[], tuple[Checkpoint, Metrics, int]],
    watch: Watch,
    accelerator: Accelerator,
    asked: Mapping[str, Any],
    provenance: dict[str, Any],
    *,
    dtype: str = "float32",
) -> Checkpoint:
    """Run a stage and save what it made, in `folder / "checkpoint"`, unless that was done; return it, as loaded.

    `begin` gives the checkpoint that is trained, the steps that do it, and their count. A stage is named by its folder.
    `asked` says, in JSON, what the stage is to make; raises OptionError if it made something else.
    """
    target = folder / "checkpoint"
    finished = (target / FACTS).exists()
    if accelerator.is_main_process:
        claim(folder, asked, begun=None if finished else False)  # what is unfinished, the loop itself claims
    if not finished:
        checkpoint, steps, count = begin()
        watch(folder.name, steps, count)
        stages = [*checkpoint.facts.provenance.get("stages", []), folder.name]
        save_trained(checkpoint, target, accelerator, {"stages": stages, **provenance})
    return load_checkpoint(target, dtype=dtype)
