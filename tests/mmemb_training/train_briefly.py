"""Trains a checkpoint for a few steps and writes the losses: run by torchrun, or alone, by test_trainer.py.

usage: train_briefly.py CHECKPOINT FOLDER (alone | ddp | fsdp2) [lora] [bf16] [checkpointing]
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.joint import Lesson
from mmemb_training.nano.digits import draw_digits, exact
from mmemb_training.recipes.settings import JointRecipe, LoraSettings, Objective, Schedule, TrainedWeights
from mmemb_training.trainer import save_trained, train_jointly

STEPS = 6


def draw(step: int) -> list[Lesson]:
    digits = draw_digits("train", step, 8)
    reasons = np.random.default_rng(step).random(8) < 0.6
    return [
        Lesson(sample, exact(*digits.told[sample.question.key]) if reason else None)
        for sample, reason in zip(digits.samples, reasons, strict=True)
    ]


def accelerator_for(mode: str, precision: str) -> Accelerator:
    if mode != "fsdp2":
        unused = DistributedDataParallelKwargs(find_unused_parameters=False)
        return Accelerator(cpu=True, mixed_precision=precision, kwargs_handlers=[unused])
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3VLTextDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    # accelerate takes FSDP up on accelerators alone; torch's own FSDP2 runs on gloo, which is what is tested here.
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def main() -> None:
    source, folder, mode, *options = sys.argv[1:]
    checkpoint = load_checkpoint(Path(source))
    recipe = JointRecipe(
        schedule=Schedule(steps=STEPS, learning_rate=1e-3, warmup=2, save_every=2),
        objective=Objective(dims=(48, 24)),
        batch=8,
        length_groups=2,
    )
    weights = TrainedWeights(
        method="lora" if "lora" in options else "full",
        lora=LoraSettings(rank=4),
        gradient_checkpointing="checkpointing" in options,
    )
    accelerator = accelerator_for(mode, "bf16" if "bf16" in options else "no")
    run = train_jointly(checkpoint, draw, recipe, Path(folder), weights=weights, accelerator=accelerator)
    for metrics in run:
        if metrics["step"] == int(os.environ.get("KILL_AFTER", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
    save_trained(checkpoint, Path(folder) / "checkpoint", accelerator)
    if accelerator.is_main_process:
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        print(json.dumps([json.loads(line)["loss"] for line in lines]))


if __name__ == "__main__":
    main()
