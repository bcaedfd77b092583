"""The loop under every stage that trains: rates, clipping, metrics, states to resume from, and a stop for bad losses.

A step is a function of its number, so that a run resumed from its last state continues as if it had never stopped: bit
for bit on the CPU. A run's folder holds

    state-000200/    accelerate's state after that step, sharded where weights are: what trains, its optimizer, random
                     numbers
    run.json         what the run is, so that another one does not continue it
    metrics.jsonl    one line a step
    stopped.json     the batch that stopped the run, if one did
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmemb_deploy.errors import MmembError
from mmemb_deploy.files import claim, write_whole
from mmemb_training.recipes.settings import Schedule

RUN, METRICS, STOPPED = "run.json", "metrics.jsonl", "stopped.json"
RECENT = 50  # steps whose median loss tells a spike


class TrainingError(MmembError):
    """A loss that is not finite, or far above the recent ones; the message names where its batch was saved."""


class Step(Protocol):
    """One step of a stage: accumulates gradients; returns the loss and what to log of it."""

    def __call__(self, step: int) -> tuple[Tensor, dict[str, Tensor]]: ...


def run_steps(
    folder: Path,
    identity: dict[str, Any],
    schedule: Schedule,
    accelerator: Accelerator,
    weights: nn.Module,
    optimizer: Any,
    step_of: Step,
    describe: Callable[[int], Any],
) -> Iterator[dict[str, float]]:
    """Run a stage's steps from where `folder` stopped, yielding metrics; `weights` and `optimizer` are prepared.

    `identity` says what the run is, in JSON; `describe` names the samples of a step's batch. Raises OptionError if the
    folder holds another run, TrainingError for a loss that is not finite or a spike.
    """
    start, seconds = _resume(folder, identity, accelerator, weights)
    recent: deque[float] = deque(maxlen=RECENT)
    for step in range(start, schedule.length):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad()
        loss, terms = step_of(step)
        value = loss.item()
        watched = schedule.spike and len(recent) == RECENT
        bad = not math.isfinite(value) or (watched and value > schedule.spike * statistics.median(recent))
        if _anywhere(bad, accelerator):
            _stop(folder, step, value, terms, describe(step), accelerator)
        recent.append(value)
        norm: Any = accelerator.clip_grad_norm_(weights.parameters(), schedule.gradient_norm)
        if _anywhere(not math.isfinite(norm.item()), accelerator):
            _stop(folder, step, value, {**terms, "gradient_norm": norm}, describe(step), accelerator)
        optimizer.step()
        seconds += time.perf_counter() - began
        metrics = {"step": step + 1, "loss": value, **{name: term.item() for name, term in terms.items()}}
        metrics |= {"gradient_norm": norm.item(), "seconds": round(seconds, 3)}
        if accelerator.is_main_process:
            with (folder / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.length:
            _save(folder, step + 1, accelerator)
        yield metrics


def _resume(folder: Path, identity: dict[str, Any], accelerator: Accelerator, weights: nn.Module) -> tuple[int, float]:
    """Load the last state of an unfinished run; return the next step and the seconds spent so far."""
    if accelerator.is_main_process:
        claim(folder, identity, name=RUN)
    accelerator.wait_for_everyone()
    states = sorted(folder.glob("state-*[0-9]"))
    step = int(states[-1].name.rpartition("-")[2]) if states else 0
    lines = (folder / METRICS).read_text().splitlines()[:step] if step else []
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_whole(folder / METRICS, "".join(line + "\n" for line in lines))
    if not states:
        return 0, 0.0
    frozen = any(not weight.requires_grad for weight in weights.parameters())  # which a state does not hold
    missing: dict[str, Any] = {"strict": False} if frozen else {}
    accelerator.load_state(str(states[-1]), **missing)
    return step, float(json.loads(lines[-1])["seconds"])


def _save(folder: Path, step: int, accelerator: Accelerator) -> None:
    """Write a state under a temporary name, rename it, and drop the older ones: a kill leaves one that is whole."""
    older, new = sorted(folder.glob("state-*[0-9]")), folder / "state.new"
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    hook = accelerator.register_save_state_pre_hook(_leave_out_frozen)
    accelerator.save_state(str(new))
    hook.remove()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        new.rename(folder / f"state-{step:06d}")
        for state in older:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


def _leave_out_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
    """Take out of the weights of a state those that do not train: the stage's start has them."""
    for model, state in zip(models, weights, strict=False):  # there are none where each process writes its part
        for name, weight in model.named_parameters(remove_duplicate=False):
            if not weight.requires_grad:
                state.pop(name, None)


def _anywhere(here: object, accelerator: Accelerator) -> bool:
    """Return whether something is so in any process: one that stops alone leaves the others waiting for it."""
    if accelerator.num_processes == 1:
        return bool(here)
    found: Any = accelerator.reduce(torch.tensor(float(bool(here)), device=accelerator.device), "sum")
    return bool(found)


def _stop(folder: Path, step: int, loss: float, terms: dict[str, Tensor], batch: Any, accelerator: Accelerator) -> None:
    """Save what stopped the run, and raise TrainingError."""
    path = folder / STOPPED
    figures = {"step": step + 1, "loss": loss, **{name: term.item() for name, term in terms.items()}}
    if accelerator.is_main_process:
        path.write_text(json.dumps({"metrics": figures, "batch": batch}, indent=1, default=str))
    raise TrainingError(
        f"step {step + 1} has a loss of {loss} ({figures}); its batch is in {path}. Look at it, then lower the "
        f"learning rate or drop the sample: the last good state is kept, and the same command goes on from it"
    )
