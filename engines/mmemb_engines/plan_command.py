"""The command `mmemb plan`: what a bundle's engines would take of a device, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmemb_deploy.cli.options import Json
from mmemb_deploy.devices import DEVICES, find_device
from mmemb_engines.commands import Direct


def register(app: typer.Typer) -> None:
    """Add the command to `mmemb`."""
    app.command("plan")(plan)


def plan(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, with portable graphs.")],
    device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}.")],
    batch: Annotated[int, typer.Option(help="Most inputs that run together.")] = 32,
    tokens: Annotated[int | None, typer.Option(help="Most tokens of a prompt; the bundle's limit by default.")] = None,
    rationale: Annotated[int | None, typer.Option(help="Tokens of a rationale; the bundle's limit by default.")] = None,
    direct: Direct = True,
    as_json: Json = False,
) -> None:
    """Say what fits a device, how much at once, and how long it takes; all of it estimated, without a GPU."""
    from rich.console import Console

    from mmemb_deploy.bundle.folder import Bundle
    from mmemb_deploy.bundle.manifest import read_manifest
    from mmemb_deploy.figures import figure_table
    from mmemb_engines.build import without_direct
    from mmemb_engines.plan import make_plan

    chosen = find_device(device)
    opened = Bundle(bundle, read_manifest(bundle))  # its weights, which the checks would read, may be gigabytes
    planned = opened if direct else without_direct(opened)
    made = make_plan(planned, chosen, rows=batch, tokens=tokens, rationale=rationale)
    if as_json:
        print(json.dumps({"bundle": str(bundle)} | made.as_dict()))
        return
    console = Console(highlight=False)
    title = (
        f"{bundle} on {chosen.name} ({chosen.target}, {chosen.memory_gib:g} GiB, {chosen.bandwidth:,g} GB/s): estimates"
    )
    console.print(figure_table(title, made.figures()))
    console.print(made.verdict, style="green" if made.fits else "red", soft_wrap=True)
    console.print(f"nothing was run; peaks and bandwidth: {chosen.source}", markup=False, soft_wrap=True)
