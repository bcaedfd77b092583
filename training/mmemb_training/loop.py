"""The training loop: metrics to JSON lines, checkpoints, and a resume that continues bit for bit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLForConditionalGeneration

from mmemb_deploy.errors import OptionError
from mmemb_deploy.prompts import PromptEncoder
from mmemb_deploy.rows import RowEncoder
from mmemb_training.checkpoint import CheckpointFacts, save_checkpoint
from mmemb_training.joint import draw_step, step_loss
from mmemb_training.nano import (
    MAX_RATIONALE_TOKENS,
    NANO_PROMPT,
    NANO_VISION,
    PIXELS,
    VIDEO_PIXELS,
    NanoRecipe,
    nano_config,
    nano_tokenizer,
)

STATE = "training_state.pt"
METRICS = "metrics.jsonl"


def learning_rate(recipe: NanoRecipe, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def train_nano(folder: Path, recipe: NanoRecipe) -> Generator[dict[str, float]]:
    """Train into `folder`, yielding the metrics of every step; a folder that holds an unfinished run goes on.

    Raises OptionError if the folder's run was started with another recipe.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = nano_tokenizer()
    encoder = RowEncoder(PromptEncoder(tokenizer, NANO_PROMPT), NANO_VISION)
    model = Qwen3VLForConditionalGeneration(nano_config(encoder.prompt, tokenizer.get_vocab_size())).train()
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    plain = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    start, seconds = _resume(folder, recipe, model, optimizer)
    for step in range(start, recipe.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss, metrics = step_loss(model, encoder, draw_step(encoder, recipe, step), recipe)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of step {step} is {loss.item()}: {metrics}")
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        seconds += time.perf_counter() - began
        row = {"step": step + 1, "loss": loss.item(), **metrics, "gradient_norm": norm.item(), "seconds": seconds}
        with (folder / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            _save(folder, recipe, model, optimizer, tokenizer, encoder, step + 1, seconds)
        yield row


def _resume(folder: Path, recipe: NanoRecipe, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load an unfinished run's weights and optimizer; return the next step and the seconds spent so far."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / STATE).exists():
        (folder / METRICS).unlink(missing_ok=True)
        return 0, 0.0
    state = torch.load(folder / STATE, weights_only=True)
    if state["recipe"] != _plain(recipe):
        raise OptionError(f"{folder} holds a run with another recipe, {state['recipe']}; choose another folder")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    kept = (folder / METRICS).read_text().splitlines()[: state["step"]]
    (folder / METRICS).write_text("".join(line + "\n" for line in kept))
    return state["step"], state["seconds"]


def _save(
    folder: Path,
    recipe: NanoRecipe,
    model: Any,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    encoder: RowEncoder,
    step: int,
    seconds: float,
) -> None:
    facts = CheckpointFacts(
        prompt=NANO_PROMPT,
        dims=recipe.dims,
        max_rationale_tokens=MAX_RATIONALE_TOKENS,
        markers=encoder.prompt.ids,
        provenance={"data": "digitchain", "recipe": _plain(recipe), "step": step, "seconds": round(seconds)},
    )
    save_checkpoint(folder, model, tokenizer, facts, pixels=PIXELS, video_pixels=VIDEO_PIXELS)
    state = {
        "recipe": _plain(recipe), "step": step, "seconds": seconds,
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    torch.save(state, folder / f"{STATE}.new")
    (folder / f"{STATE}.new").replace(folder / STATE)


def _plain(recipe: NanoRecipe) -> dict[str, Any]:
    return asdict(recipe) | {"dims": list(recipe.dims)}
