"""The command `mmemb train plan`: what a run needs on a machine, before it is started."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mmemb_deploy.errors import OptionError, check_known
from mmemb_training.plan.devices import DEVICES, UTILISATION, machine
from mmemb_training.plan.loads import FILL
from mmemb_training.plan.planner import Line, Plan, make_plan
from mmemb_training.plan.recipes import METHODS, load_recipe, recipe_names
from mmemb_training.plan.shapes import SHAPES, find_shape

GIB, PETA = 2**30, 1e15

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
    chosen = load_recipe(_recipe_for(shape.name, method) if recipe is None else recipe)
    there = machine(
        gpus, device=device, memory_gib=memory_gib, tflops=tflops, bandwidth=bandwidth, utilisation=utilisation
    )
    made = make_plan(shape, chosen.with_method(method), there, examples=examples, batch=batch, fill=fill)
    if as_json:
        print(json.dumps(made.as_dict()))
    else:
        _show(made)


def _recipe_for(model: str, method: str | None) -> str:
    """Return the packaged recipe of a model and a method (lora if not given)."""
    check_known("method", method or "lora", METHODS)
    name = f"{model}-{method or 'lora'}"
    if name not in recipe_names():
        raise OptionError(f"no recipe is named {name!r}: pass one of {', '.join(recipe_names())}, or a .toml file")
    return name


def _show(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{made.model}, recipe {made.recipe} ({made.method}), {made.examples:,} examples")
    for heading, justify in (("", "left"), ("", "right"), ("from", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # the literals above
    section = None
    for line in made.lines:
        if line.section != section:
            section = line.section
            table.add_section()
            table.add_row(f"[bold]{section}[/bold]")
        table.add_row(line.name, _value(line), line.basis)
    console.print(table)
    if made.fits:
        console.print(f"fits: {made.micro_batch} prompts at once, {made.chunks} chunks a step", style="green")
        return
    console.print(f"does not fit: {made.reason}", style="red")
    for change in made.changes:
        console.print(f"  fits with {change}")


def _value(line: Line) -> str:
    if line.value is None:
        return "not known"
    if line.unit == "B":
        return f"{line.value / GIB:,.2f} GiB"
    if line.unit == "FLOP":
        return f"{line.value / PETA:,.3g} PFLOP"
    if line.unit == "FLOP/s":
        return f"{line.value / 1e12:,.1f} TFLOP/s"
    number = f"{line.value:,.0f}" if line.value == round(line.value) else f"{line.value:,.2f}"
    return f"{number} {line.unit}".rstrip()
