"""The commands that measure quality: `digitchain`, `frontier`, and the demo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mmemb_benchmarks.commands.arguments import Backend, BundleOption, Json, Out, Seed, Threads, check_output, finish
from mmemb_deploy.errors import OptionError


def register(bench: typer.Typer) -> None:
    """Add the commands of `mmemb bench`."""
    for command in (digitchain, frontier):
        bench.command(command.__name__)(command)


def digitchain(
    bundle: BundleOption = None,
    seed: Seed = 0,
    queries: Annotated[int, typer.Option(min=1, help="Queries of each family, and of the mixed traffic.")] = 200,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Measure retrieval over unseen handwritten digits in every mode and with every control."""
    from rich.console import Console

    from mmemb_benchmarks.results import stamp
    from mmemb_benchmarks.workload import assemble, load_uncached
    from mmemb_deploy.evaluation.controls import run_digitchain

    check_output(output)
    notes = Console(stderr=True)
    embedder = assemble(*load_uncached(bundle, "auto", threads))
    with notes.status("measuring") as status:
        result = run_digitchain(embedder, seed=seed, queries=queries, report=status.update)
    found = {"queries": queries, "seed": seed, **result}
    finish(stamp("digitchain", found, embedder), output=output, as_json=as_json, show=_show_digitchain)


def _show_digitchain(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mmemb_deploy.evaluation.controls import MODES

    table = Table(title=f"hit@1, {result['queries']} queries a row, seed {result['seed']}")
    for column in ("family", *MODES):
        table.add_column(column.replace("_", " "), justify="left" if column == "family" else "right")
    for family, hits in result["families"].items():
        table.add_row(family, *(f"{hits[mode]:.3f}" for mode in MODES))
    table.add_section()
    for key in result["mixed"]["never"]:
        table.add_row(f"mixed: {key}", *(f"{result['mixed'][mode][key]:.3f}" for mode in MODES))
    Console().print(table)


def frontier(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder; the embedded nano bundle by default.")] = None,
    backend: Backend = "auto",
    pairs: Annotated[
        Path | None, typer.Option(help="Pairs, as mmemb calibrate reads them; DigitChain's mixed traffic by default.")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Queries of DigitChain, where no pairs are given.")] = 400,
    seed: Seed = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Show what every threshold of the gate gives in quality and takes in time, beside a random and an oracle gate."""
    from rich.console import Console

    from mmemb_benchmarks.measure.frontier import measure_frontier
    from mmemb_benchmarks.results import stamp
    from mmemb_benchmarks.workload import Workload, assemble, load_uncached

    check_output(output)
    embedder = assemble(*load_uncached(bundle, backend, threads))
    drawn = Workload.of(embedder, pairs=pairs, queries=queries, seed=seed)
    Console(stderr=True).print(f"embedding {len(drawn.pairs)} queries by both routes")
    found = measure_frontier(embedder, drawn)
    finish(stamp("frontier", found.model_dump(), embedder), output=output, as_json=as_json, show=_show_frontier)


def _show_frontier(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['pairs']} pairs; {result['source']}")
    for column in ("gate", "threshold", "reasoning rate", "hit@1", "mean ms alone", "rationale tokens"):
        table.add_column(column, justify="left" if column == "gate" else "right")
    for gate in ("curve", "random", "oracle"):
        for point in result[gate] if gate == "curve" else result[gate][::4]:
            default = gate == "curve" and point["threshold"] == result["threshold"]
            table.add_row(
                "the bundle's default" if default else "learnt" if gate == "curve" else gate,
                "-" if point["threshold"] is None else f"{point['threshold']:.2f}",
                f"{point['reasoning_rate']:.1%}",
                f"{point['hit_at_1']:.3f}",
                f"{point['latency_ms']:.2f}",
                f"{point['rationale_tokens']:.1f}",
                style="bold" if default else None,
            )
        table.add_section()
    Console().print(table)


def demo(
    bundle: BundleOption = None,
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    seed: Seed = 7,
    as_json: Json = False,
) -> None:
    """Embed real digits and questions about them; show what was thought and found, and draw it."""
    from rich.console import Console
    from rich.table import Table

    from mmemb_benchmarks.demo import run_demo
    from mmemb_benchmarks.figure import draw
    from mmemb_benchmarks.workload import assemble, load_uncached

    if output.suffix != ".png" or not output.parent.is_dir():
        raise OptionError(f"--output is {output}: it must be a .png file in a folder that exists")
    notes = Console(stderr=True)
    with notes.status("embedding real digits"):
        result = run_demo(assemble(*load_uncached(bundle, "auto", None)), seed)
        draw(result, output)
    summaries = {mode: outcome.summary() for mode, outcome in result.modes.items()}
    if as_json:
        print(json.dumps({"modes": summaries, "picture": str(output)}))
        return
    console = Console()
    shown = Table(title="one query of every family, under auto")
    for column in ("family", "asked", "route", "gate", "thought", "best matches"):
        shown.add_column(column)
    for showcase in result.showcases:
        detail = showcase.detail
        matches = [showcase.example.candidates[place] for place in showcase.ranking]
        found = ", ".join(match.content.get("text") or f"a drawn {match.value}" for match in matches)
        shown.add_row(
            showcase.example.family,
            showcase.question,
            detail.route.value,
            f"{detail.gate_score:.3f}",
            (detail.rationale or "-").replace(";", "; "),
            f"[{'green' if showcase.found else 'red'}]{found}",
        )
    console.print(shown)
    modes = Table(title=f"{len(result.modes['auto'].hits_Q)} queries of mixed traffic")
    for column in ("mode", "hit@1", "rationale tokens", "median ms alone", "reasoning rate"):
        modes.add_column(column, justify="left" if column == "mode" else "right")
    for mode, summary in summaries.items():
        modes.add_row(
            mode,
            f"{summary['hit_at_1']:.3f}",
            f"{summary['rationale_tokens']:.2f}",
            f"{summary['p50_ms']:.2f}",
            f"{summary['reasoning_rate']:.0%}",
        )
    console.print(modes)
    console.print(f"picture: {output}")
