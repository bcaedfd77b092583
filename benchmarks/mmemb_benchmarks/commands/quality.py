"""The commands that measure quality: `digitchain`, `frontier`, and the demo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmemb_benchmarks.commands.shared import Out, Pairs, Queries, Seed, check_output, finish, table
from mmemb_deploy.cli.options import Backend, Bundle, Device, Json, Threads
from mmemb_deploy.errors import OptionError

if TYPE_CHECKING:
    from mmemb_benchmarks.measure.frontier import FrontierResult


def digitchain(
    bundle: Bundle = None,
    backend: Backend = "auto",
    seed: Seed = 0,
    queries: Annotated[int, typer.Option(min=1, help="Queries of each family, and of the mixed traffic.")] = 200,
    device: Device = 0,
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
    embedder = assemble(*load_uncached(bundle, backend, threads, device))
    with notes.status("measuring") as status:
        result = run_digitchain(embedder, seed=seed, queries=queries, report=status.update)
    found = {"queries": queries, "seed": seed, **result}
    finish(stamp("digitchain", found, embedder), output=output, as_json=as_json, show=_show_digitchain)


def _show_digitchain(result: Mapping[str, Any]) -> None:
    from rich.console import Console

    from mmemb_deploy.evaluation.controls import MODES

    title = f"hit@1, {result['queries']} queries a row, seed {result['seed']}"
    shown = table(title, "family", *(mode.replace("_", " ") for mode in MODES))
    for family, hits in result["families"].items():
        shown.add_row(family, *(f"{hits[mode]:.3f}" for mode in MODES))
    shown.add_section()
    for key in result["mixed"]["never"]:
        shown.add_row(f"mixed: {key}", *(f"{result['mixed'][mode][key]:.3f}" for mode in MODES))
    Console().print(shown)


def frontier(
    bundle: Bundle = None,
    backend: Backend = "auto",
    pairs: Pairs = None,
    queries: Queries = 400,
    seed: Seed = 0,
    device: Device = 0,
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
    embedder = assemble(*load_uncached(bundle, backend, threads, device))
    drawn = Workload.of(embedder, pairs=pairs, queries=queries, seed=seed)
    Console(stderr=True).print(f"embedding {len(drawn.pairs)} queries by both routes")
    found = measure_frontier(embedder, drawn)
    finish(stamp("frontier", found, embedder), output=output, as_json=as_json, show=_show_frontier)


def _show_frontier(result: FrontierResult) -> None:
    from rich.console import Console

    from mmemb_benchmarks.results import digits

    shown = table(
        f"{result.pairs} pairs; {result.source}",
        *("gate", "threshold", "reasoning rate", "hit@1", "mean ms alone", "rationale tokens"),
    )
    for gate, points in (("learnt", result.curve), ("random", result.random[::4]), ("oracle", result.oracle[::4])):
        for point in points:
            default = gate == "learnt" and point.threshold == result.threshold
            shown.add_row(
                "the bundle's default" if default else gate,
                "-" if point.threshold is None else f"{point.threshold:.2f}",
                f"{point.reasoning_rate:.1%}",
                f"{point.hit_at_1:.3f}",
                digits(point.latency_ms),
                digits(point.rationale_tokens),
                style="bold" if default else None,
            )
        shown.add_section()
    Console().print(shown)


def demo(
    bundle: Bundle = None,
    backend: Backend = "auto",
    seed: Seed = 7,
    device: Device = 0,
    threads: Threads = None,
    output: Annotated[Path, typer.Option("--out", help="Where the picture goes, a .png file.")] = Path("demo.png"),
    as_json: Json = False,
) -> None:
    """Embed real digits and questions about them; show what was thought and found, and draw it."""
    from rich.console import Console

    from mmemb_benchmarks.demo import draw, run_demo
    from mmemb_benchmarks.results import digits
    from mmemb_benchmarks.workload import assemble, load_uncached

    if output.suffix != ".png" or not output.parent.is_dir():
        raise OptionError(f"--out is {output}: it must be a .png file in a folder that exists")
    notes = Console(stderr=True)
    with notes.status("embedding real digits"):
        showcases, outcomes = run_demo(assemble(*load_uncached(bundle, backend, threads, device)), seed)
        draw(showcases, outcomes, output)
    summaries = {mode: outcome.summary() for mode, outcome in outcomes.items()}
    if as_json:
        print(json.dumps({"modes": summaries, "picture": str(output)}))
        return
    console = Console()
    columns = "family", "asked", "route", "gate", "thought", "best matches"
    shown = table("one query of every family, under auto", *columns, left=len(columns))
    for showcase in showcases:
        detail = showcase.detail
        matches = [showcase.example.candidates[index] for index in showcase.ranking]
        found = ", ".join(match.content.get("text") or f"a drawn {match.value}" for match in matches)
        shown.add_row(
            showcase.example.family,
            showcase.question,
            detail.route.value,
            f"{detail.gate_score:.3f}",
            showcase.thought or "-",
            f"[{'green' if showcase.found else 'red'}]{found}",
        )
    console.print(shown)
    modes = table(
        f"{len(outcomes['auto'].hits_Q)} queries of mixed traffic",
        *("mode", "hit@1", "rationale tokens", "median ms alone", "reasoning rate"),
    )
    for mode, summary in summaries.items():
        modes.add_row(
            mode,
            f"{summary['hit_at_1']:.3f}",
            digits(summary["rationale_tokens"]),
            digits(summary["p50_ms"]),
            f"{summary['reasoning_rate']:.0%}",
        )
    console.print(modes)
    console.print(f"picture: {output}")
