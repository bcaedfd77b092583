"""The commands `mmemb demo` and `mmemb bench`, by topic."""

from __future__ import annotations

import typer

from mmemb_benchmarks.commands import outcome, peers, quality, speed, suite


def register(app: typer.Typer) -> None:
    """Add the benchmark commands to `mmemb`."""
    bench = typer.Typer(no_args_is_help=True, help="Measure a bundle.")
    for topic in (quality, speed, suite, peers, outcome):
        topic.register(bench)
    app.add_typer(bench, name="bench")
    app.command("demo")(quality.demo)
