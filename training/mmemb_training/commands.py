"""The commands `mmemb train ...`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmemb_deploy.cli.options import Json
from mmemb_deploy.errors import MissingExtraError
from mmemb_training.recipes.command import plan

if TYPE_CHECKING:
    from mmemb_training.nano.method import NanoRecipe
    from mmemb_training.stage import Watch

SHOWN = ("direct", "reasoned", "rationale", "decision", "reward", "reasoning_rate")  # beside a progress bar

Folder = Annotated[Path, typer.Argument(help="Where the run goes; a run that was interrupted goes on.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the weights and of the examples.")]
Scale = Annotated[float, typer.Option(min=0.001, help="Share of the recipe's steps and questions, for a quick try.")]


def register(app: typer.Typer) -> None:
    """Add the training commands to `mmemb`."""
    train = typer.Typer(no_args_is_help=True, help="Train a checkpoint.")
    train.command("nano")(nano)
    train.command("ablation")(ablation)
    train.command("strips")(strips)
    train.command("plan")(plan)
    train.command("run")(run)
    train.command("random")(random)
    train.command("adopt")(adopt)
    app.add_typer(train, name="train")


def nano(folder: Folder, seed: Seed = 0, scale: Scale = 1.0, as_json: Json = False) -> None:
    """Train the embedded default model on DigitChain by the full method: about 40 minutes on 2 cores."""
    recipe, watch = _setting(seed, scale)
    from mmemb_training.nano.method import NanoRun

    checkpoint = NanoRun(folder, recipe, watch).full()
    print(json.dumps({"checkpoint": str(checkpoint)}) if as_json else f"checkpoint: {checkpoint}")


def ablation(
    folder: Folder,
    seed: Seed = 0,
    scale: Scale = 1.0,
    queries: Annotated[int, typer.Option(min=20, help="Queries of the mixed traffic in every measurement.")] = 1000,
    as_json: Json = False,
) -> None:
    """Train every row of the ablation table, and write ablation.json, ablation.md and ablation.png."""
    recipe, watch = _setting(seed, scale)
    from rich.console import Console

    from mmemb_training.nano.ablation import Ablation
    from mmemb_training.nano.ablation_report import draw, markdown

    notes = Console(stderr=True)
    tables = Ablation(folder, recipe, watch, notes.print, queries).tables()
    (folder / "ablation.json").write_text(json.dumps(tables, indent=1) + "\n")
    (folder / "ablation.md").write_text(markdown(tables))
    draw(tables, folder / "ablation.png")
    print(json.dumps(tables) if as_json else f"tables: {folder / 'ablation.md'}, {folder / 'ablation.png'}")


def strips(
    folder: Folder,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of stages 3 and 4, on one backbone.")] = 5,
    scale: Scale = 1.0,
    queries: Annotated[int, typer.Option(min=20, help="Test questions, each in eight renderings.")] = 2000,
    as_json: Json = False,
) -> None:
    """Measure selection and control on strips, where each must earn its place; write strips.json and strips.md."""
    _, watch = _setting(0, scale)
    from rich.console import Console

    from mmemb_training.strips.benchmark import run_benchmark
    from mmemb_training.strips.method import Shared, StripsRecipe
    from mmemb_training.strips.report import markdown, result

    recipe = StripsRecipe().scaled(scale)
    found = result(run_benchmark(Shared(folder, recipe, watch), seeds, queries, Console(stderr=True).print))
    found = {"recipe": asdict(recipe), "queries": queries, **found}
    (folder / "strips.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "strips.md").write_text(markdown(found))
    print(json.dumps(found) if as_json else f"tables: {folder / 'strips.md'}")


def run(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe's name, or a .toml file.")],
    folder: Folder,
    data: Annotated[list[str], typer.Option(help="NAME=FOLDER of a public training set; repeat for several.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each data set; all by default.")] = None,
    upto: Annotated[str, typer.Option(help="The last stage to run: pool, selection, joint or control.")] = "control",
) -> None:
    """Train a Qwen3-VL by the full method; start it with torchrun to use several GPUs."""
    from mmemb_deploy.errors import check_known
    from mmemb_training.recipes.load import load_recipe

    settings = load_recipe(recipe)
    try:
        from mmemb_training.data.table import read_samples
        from mmemb_training.run_recipe import STAGES, Run
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "train") from error
    from rich.console import Console

    check_known("stage", upto, STAGES)
    Run(settings, read_samples(data, limit, folder / "samples"), folder, show_progress, Console(stderr=True)).upto(upto)
    print(f"run: {folder}")


def random(
    shape: Annotated[str, typer.Argument(help="Name of a shape, as `mmemb train plan` takes it.")],
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    seed: Seed = 0,
) -> None:
    """Write a checkpoint of random weights at a real shape, to measure speed and memory with."""
    from mmemb_training.random_checkpoint import random_checkpoint
    from mmemb_training.recipes.shapes import find_shape

    random_checkpoint(find_shape(shape), folder, seed=seed)
    print(f"checkpoint: {folder}")


def adopt(
    source: Annotated[Path, typer.Argument(help="Folder of a public Qwen3-VL-Embedding, as its hub page has it.")],
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder to write; the weights stay where they are.")],
) -> None:
    """Make a public embedding model exportable: `mmemb export FOLDER BUNDLE` then gives a bundle that never reasons."""
    try:
        from mmemb_training.adopt import adopt as make
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "train") from error
    facts = make(source, folder)
    print(f"checkpoint: {folder}, embeddings of {', '.join(map(str, facts.dims))} values")


def _setting(seed: int, scale: float) -> tuple[NanoRecipe, Watch]:
    try:
        from mmemb_training.nano.method import NanoRecipe
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "train") from error
    return NanoRecipe(seed=seed).scaled(scale), show_progress


def show_progress(name: str, metrics: Iterator[dict[str, float]], steps: int) -> None:
    """Run a stage's steps beside a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (
        TextColumn(f"{name:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps)
        for row in metrics:
            parts = " ".join(f"{key} {row[key]:.3f}" for key in SHOWN if key in row)
            progress.update(task, completed=row["step"], description=parts)
