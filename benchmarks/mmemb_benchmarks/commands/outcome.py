"""The commands that read results: `compare` and `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmemb_benchmarks.commands.shared import table
from mmemb_deploy.cli.options import Json

Result = Annotated[Path, typer.Argument(help="JSON of `mmemb bench suite`, `latency` or `peers`.")]


def report(
    sources: Annotated[list[Path], typer.Argument(help="Results of mmemb bench, or folders of them.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for index.html and the charts.")] = Path("report"),
) -> None:
    """Make one self-contained page, with its charts as PNGs beside it."""
    from mmemb_benchmarks.report.page import write_report

    page, passed_over = write_report(sources, folder)
    for path in passed_over:
        print(f"passed over: {path.name}")
    print(page)


def compare(
    old: Result,
    new: Result,
    tolerance: Annotated[float, typer.Option(min=0, help="Share by which a median may differ.")] = 0.1,
    as_json: Json = False,
) -> None:
    """Print what moved beyond noise between two runs; exit with 1 if anything became slower."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape

    from mmemb_benchmarks import compare as comparing
    from mmemb_benchmarks.results import read_result

    before, now = (read_result(path, comparing.KINDS) for path in (old, new))
    found = comparing.compare(before, now, tolerance)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        console = Console()
        for line in found.differing:
            console.print(f"[yellow]not the same circumstances[/]: {line}")
        moved = table(f"medians that moved beyond noise and {tolerance:.0%}", "benchmark", "time, new over old")
        for name, ratio in (found.slower | found.faster).items():
            moved.add_row(escape(name), f"{ratio:.2f}", style="red" if ratio > 1 else "green")
        if moved.row_count:
            console.print(moved)
        for label, names in (("only before", found.missing), ("only now", found.added)):
            if names:
                console.print(f"{label}: {escape(', '.join(names))}")
        console.print(f"{len(found.slower)} slower, {len(found.faster)} faster, {found.unmoved} unmoved")
    raise typer.Exit(1 if found.slower else 0)
