"""The command `mmemb train plan`: what a run needs on a machine, before it is started."""

from __future__ import annotations

import json
from typing import Annotated, get_args

import typer

from mmemb_deploy.errors import OptionError, check_known
from mmemb_deploy.figures import figure_table
from mmemb_training.recipes.estimate import FILL, Estimate, estimate
from mmemb_training.recipes.load import load_recipe, recipe_names
from mmemb_training.recipes.machines import DEVICES, UTILISATION, machine
from mmemb_training.recipes.settings import Method, changed
from mmemb_training.recipes.shapes import SHAPES, find_shape

_MODELS = f"{', '.join(SHAPES)}, a public model's hub id, or a checkpoint folder."


def plan(
    model: Annotated[str, typer.Option(help=_MODELS)] = "qwen3-vl-4b",
    gpus: Annotated[int, typer.Option(help="GPUs that train together.")] = 1,
    memory_gib: Annotated[float | None, typer.Option(help="Memory of each GPU; the device's if not given.")] = None,
    device: Annotated[str | None, typer.Option(help=f"{', '.join(DEVICES)}: peak, bandwidth, memory.")] = None,
    tflops: Annotated[float | None, typer.Option(help="Dense bf16 peak of each GPU, for one not listed.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Memory bandwidth of each GPU, GB/s.")] = None,
    method: Annotated[str | None, typer.Option(help="full or lora; the recipe's if not given.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Name or .toml file; MODEL-METHOD if not given.")] = None,
    batch: Annotated[int | None, typer.Option(help="Queries of a joint step, over all GPUs.")] = None,
    examples: Annotated[int, typer.Option(help="Pairs of the pool, the selection and an epoch.")] = 100_000,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that is reached; an assumption.")] = UTILISATION,
    fill: Annotated[float, typer.Option(help="Share of the limits that a mean example uses; an assumption.")] = FILL,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what fits, how much at once, and how many hours each stage takes; nothing is loaded or downloaded."""
    shape = find_shape(model)
    chosen = load_recipe(_recipe_for(shape.name, method) if recipe is None else recipe).with_method(method)
    if batch is not None:
        chosen = changed(chosen, "joint.batch", batch)
    there = machine(
        gpus, device=device, memory_gib=memory_gib, tflops=tflops, bandwidth=bandwidth, utilisation=utilisation
    )
    made = estimate(shape, chosen, there, examples=examples, fill=fill)
    if as_json:
        about = {"model": shape.name, "recipe": chosen.name, "method": chosen.weights.method, "examples": examples}
        print(json.dumps(about | made.as_dict()))
    else:
        _show(f"{shape.name}, recipe {chosen.name} ({chosen.weights.method}), {examples:,} examples", made)


def _recipe_for(model: str, method: str | None) -> str:
    """Return the packaged recipe of a model and a method (lora if not given)."""
    check_known("method", method or "lora", get_args(Method))
    name = f"{model}-{method or 'lora'}"
    if name not in recipe_names():
        raise OptionError(f"no recipe is named {name!r}: pass one of {', '.join(recipe_names())}, or a .toml file")
    return name


def _show(title: str, made: Estimate) -> None:
    from rich.console import Console

    console = Console()
    console.print(figure_table(title, made.figures))
    if made.fits:
        joint = made.stages["joint"]
        console.print(f"fits: {joint.micro_batch} questions at once, {joint.chunks} chunks a step", style="green")
        return
    console.print(f"does not fit: {made.reason}", style="red")
    for change in made.changes:
        console.print(f"  fits with {change}")
