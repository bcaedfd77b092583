"""The command `suite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmemb_benchmarks.commands.shared import Backend, BundleOption, Threads, check_output, table


def register(bench: typer.Typer) -> None:
    """Add the command."""
    bench.command("suite")(suite)


def suite(
    bundle: BundleOption = None,
    backend: Backend = "auto",
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0, help="What the rounds of one benchmark should take together.")] = 1.0,
    passes: Annotated[int, typer.Option(min=1, help="Times that the suite runs, with a share of the rounds each.")] = 3,
    select: Annotated[str, typer.Option(help="Which benchmarks run, as of pytest -k.")] = "bench",
    output: Annotated[Path, typer.Option("--out", help="Where pytest-benchmark's JSON goes.")] = Path("suite.json"),
) -> None:
    """Time every stage and every workload of a bundle by pytest-benchmark."""
    from rich.console import Console
    from rich.markup import escape

    from mmemb_benchmarks.results import read_result
    from mmemb_benchmarks.suite import run_suite
    from mmemb_benchmarks.suite.setting import Setting
    from mmemb_benchmarks.workload import load_uncached

    check_output(output)
    status = run_suite(Setting(*load_uncached(bundle, backend, threads), seconds, passes), output, select)
    if status:
        raise typer.Exit(status)
    shown = table(f"{passes} passes", "benchmark", "median, ms", "p95, ms", "on")
    for benchmark in read_result(output).result:
        shown.add_row(*map(escape, benchmark.row))
    Console().print(shown)
    print(f"results: {output}")
