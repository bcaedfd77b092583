"""Trains checkpoints for a few steps, as test_trainer.py asks: imports torch and reads the digits once, then forks.

A line of its input is a job in JSON: {"source": checkpoint, "folder": of the run, "mode": "alone", "ddp" or "fsdp2",
"options": of "lora", "bf16", "checkpointing", "spoilt" and "spoilt norm", "processes": count, "kill_after": step or
null}. A line of its output holds the exit codes of the job's processes, whose own output lies in FOLDER/output-RANK.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState

from mmemb_training import trainer
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.joint import Lesson
from mmemb_training.nano.digits import draw_digits, exact
from mmemb_training.recipes.settings import JointRecipe, LoraSettings, Objective, Schedule, TrainedWeights
from mmemb_training.stage import save_trained, sharding
from mmemb_training.trainer import train_jointly

STEPS = 6
SECONDS = 240  # after which a process that waits for another one ends


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
    plugin = sharding(precision)
    plugin.cpu_ram_efficient_loading = False
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    # accelerate takes FSDP up on accelerators alone; torch's own FSDP2 runs on gloo, which is what is tested here.
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def spoil(monkeypatched: Any, calls: int) -> None:
    """Let the loss of this process be none at some call."""
    whole, left = monkeypatched.backward, iter(range(calls - 1))

    def backward(*args: Any, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, terms = whole(*args, **options)
        return loss, terms if next(left, None) is not None else {name: term * torch.nan for name, term in terms.items()}

    monkeypatched.backward = backward


def train(job: dict[str, Any], rank: int, port: int) -> None:
    """Do a job as one of its processes, several with the environment that torchrun gives."""
    signal.alarm(SECONDS)
    options, folder = job["options"], Path(job["folder"])
    with (folder / f"output-{rank}").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if job["processes"] > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    checkpoint = load_checkpoint(Path(job["source"]))
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
    if "spoilt" in options and rank == 1:
        spoil(trainer, calls=3)
    accelerator = accelerator_for(job["mode"], "bf16" if "bf16" in options else "no")
    if "spoilt norm" in options and rank == 1:
        norms = iter([torch.tensor(1.0)] * 2)
        spoilt: Any = accelerator
        spoilt.clip_grad_norm_ = lambda *_: next(norms, torch.tensor(torch.nan))
    for metrics in train_jointly(checkpoint, draw, recipe, folder, weights=weights, accelerator=accelerator):
        if metrics["step"] == job["kill_after"]:
            os.kill(os.getpid(), signal.SIGKILL)
    save_trained(checkpoint, folder / "checkpoint", accelerator)


def run(job: dict[str, Any]) -> list[int | None]:
    """Run a job in processes of its own; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(job, rank, port)) for rank in range(job["processes"])]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    draw(0)  # reads the digits, which every process would otherwise do again
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
