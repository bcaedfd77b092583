"""The commands `mmemb demo` and `mmemb bench`, by topic."""

from __future__ import annotations

from collections.abc import Callable

import typer

from mmemb_benchmarks.commands import jobs, load, outcome, quality, simulation, speed
from mmemb_benchmarks.commands.peers import peers
from mmemb_benchmarks.commands.search import search
from mmemb_benchmarks.commands.shared import OldNames

OF_A_BUNDLE: tuple[Callable[..., None], ...] = (
    quality.digitchain,
    quality.frontier,
    speed.latency,
    load.load,
    load.overload,
    simulation.simulate,
    speed.suite,
    speed.startup,
    speed.runtime,
    jobs.overlap,
    jobs.memory,
)


def register(app: typer.Typer) -> None:
    """Add the benchmark commands to `mmemb`."""
    bench = typer.Typer(no_args_is_help=True, help="Measure a bundle.")
    for command in OF_A_BUNDLE:
        bench.command(command.__name__, cls=OldNames)(command)
    for other in (peers, search, outcome.report, outcome.compare):
        bench.command(other.__name__)(other)
    app.add_typer(bench, name="bench")
    app.command("demo", cls=OldNames)(quality.demo)
