"""The command `mmemb train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmemb_deploy.errors import MissingExtraError


def register(app: typer.Typer) -> None:
    """Add the training commands to `mmemb`."""
    train = typer.Typer(no_args_is_help=True, help="Train a checkpoint.")
    train.callback()(lambda: None)
    train.command("nano")(nano)
    app.add_typer(train, name="train")


def nano(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes; a run that was interrupted goes on.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the examples.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the run; the recipe's by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last step's metrics as JSON.")] = False,
) -> None:
    """Train the embedded default model on DigitChain: about 25 minutes on 2 cores."""
    try:
        from mmemb_training.loop import train_nano
        from mmemb_training.nano import NanoRecipe
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "train") from error
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    recipe = NanoRecipe(seed=seed) if steps is None else NanoRecipe(seed=seed, steps=steps)
    metrics: dict[str, float] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=recipe.steps)
        for metrics in train_nano(folder, recipe):
            parts = " ".join(f"{name} {metrics[name]:.3f}" for name in ("direct", "reasoned", "rationale", "decision"))
            progress.update(task, completed=metrics["step"], description=parts)
    if as_json:
        print(json.dumps(metrics))
    else:
        print(f"checkpoint: {folder}")
