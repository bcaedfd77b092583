"""The commands `mmemb demo` and `mmemb bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Bundle = Annotated[Path | None, typer.Option(help="Bundle folder; the embedded nano bundle by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, for scripts.")]
Seed = Annotated[int, typer.Option(min=0, help="Which examples are drawn.")]


def register(app: typer.Typer) -> None:
    """Add the benchmark commands to `mmemb`."""
    bench = typer.Typer(no_args_is_help=True, help="Measure a bundle.")
    bench.command("digitchain")(digitchain)
    bench.command("startup")(startup)
    bench.command("peers")(peers)
    bench.command("runtime")(runtime)
    app.add_typer(bench, name="bench")
    app.command("demo")(demo)


def digitchain(
    bundle: Bundle = None,
    seed: Seed = 0,
    queries: Annotated[int, typer.Option(min=1, help="Queries of each family, and of the mixed traffic.")] = 200,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one operator; all cores by default.")] = None,
    as_json: Json = False,
) -> None:
    """Measure retrieval over unseen handwritten digits in every mode and with every control."""
    from rich.console import Console
    from rich.table import Table

    from mmemb_deploy.controls import MODES, run_digitchain
    from mmemb_deploy.embedder import Embedder

    notes = Console(stderr=True)
    embedder = Embedder.load(bundle, threads=threads)
    with notes.status("measuring") as status:
        result = run_digitchain(embedder, seed=seed, queries=queries, report=status.update)
    figures = result.as_json()
    if as_json:
        print(json.dumps(figures))
        return
    console = Console()
    table = Table(title=f"hit@1, {queries} queries a row, seed {seed}, {embedder.backend}")
    for column in ("family", *MODES):
        table.add_column(column.replace("_", " "), justify="left" if column == "family" else "right")
    for family, hits in figures["families"].items():
        table.add_row(family, *(f"{hits[mode]:.3f}" for mode in MODES))
    table.add_section()
    for key in figures["mixed"]["never"]:
        table.add_row(f"mixed: {key}", *(f"{figures['mixed'][mode][key]:.3f}" for mode in MODES))
    console.print(table)


def startup(
    bundle: Bundle = None,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes per figure.")] = 7,
    as_json: Json = False,
) -> None:
    """Measure what a fresh process pays: importing the package, and loading a bundle."""
    from mmemb_benchmarks.startup import measure_startup

    figures = measure_startup(bundle, runs)
    if as_json:
        print(json.dumps(figures))
        return
    for name, seconds in figures.items():
        print(f"{name:<16} {seconds:.3f} s")


def peers(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, which transformers runs in float32.")],
    bundles: Annotated[list[Path], typer.Argument(help="Bundles that were exported from it.")],
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of a prompt.")] = 256,
    batch: Annotated[list[int], typer.Option(min=1, help="Prompts that run together; repeat for several.")] = [1, 8],  # noqa: B006
    other: Annotated[
        list[str], typer.Option(help="Other peers: 'transformers bfloat16', 'openvino 8-bit weights'; repeat for both.")
    ] = [],  # noqa: B006
    written: Annotated[int, typer.Option(min=4, help="Tokens written after each prompt.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that warms up.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every contender.")] = 2,
    as_json: Json = False,
) -> None:
    """Run the same weights through transformers and through bundles, in turns, and print who takes how long."""
    from rich.console import Console
    from rich.table import Table

    from mmemb_benchmarks.peers import BASELINE, PEERS, compare
    from mmemb_deploy.errors import check_known

    for name in other:
        check_known("peer", name, PEERS)
    notes = Console(stderr=True)
    with notes.status("loading") as status:
        found = compare(
            checkpoint, bundles, others=other, tokens=tokens, batches=batch, written=written, rounds=rounds,
            threads=threads, report=status.update,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    names = list(found["seconds"])
    table = Table(title=f"median seconds over {rounds} rounds, {found['tokens']} tokens, {threads} threads")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for what, baseline in found["seconds"][BASELINE].items():
        cells = (
            "-" if seconds is None else f"{seconds:.4f} ({baseline / seconds:.2f}x)"
            for seconds in (found["seconds"][name].get(what) for name in names)
        )
        table.add_row(what, *cells)
    table.add_row("cosine of the embedding", *(f"{found['cosine'][name]:.6f}" for name in names))
    Console().print(table)


def runtime(
    bundle: Bundle = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder, which transformers loads in float32 to compare.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Characters of a text: its tokens, where a token is a byte.")
    ] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Texts of a call.")] = 8,
    written: Annotated[int, typer.Option(min=1, help="Words of a rationale, at most.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that warms up.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one operator.")] = 2,
    as_json: Json = False,
) -> None:
    """Measure what the runtime costs and saves beside its graphs: overhead, hand-off, prefix reuse, memory, loading."""
    from rich.console import Console

    from mmemb_benchmarks.runtime_costs import measure_loading, measure_runtime, words
    from mmemb_deploy.bundle import NANO
    from mmemb_deploy.embedder import Embedder

    folder = bundle or NANO
    notes = Console(stderr=True)  # no spinner: its thread would take turns with what is timed
    notes.print("loading")
    found = measure_loading(folder, checkpoint, threads=threads, runs=3)
    found |= measure_runtime(
        Embedder.load(folder, threads=threads), words(tokens, batch), written=written, rounds=rounds,
        report=notes.print,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<44} {value:.4g}")


def demo(
    bundle: Bundle = None,
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    seed: Seed = 7,
    as_json: Json = False,
) -> None:
    """Embed real digits and questions about them; show what was thought and found, and draw it."""
    from rich.console import Console
    from rich.table import Table

    from mmemb_benchmarks.demo import run_demo
    from mmemb_benchmarks.figure import draw
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.errors import OptionError

    if output.suffix != ".png" or not output.parent.is_dir():
        raise OptionError(f"--output is {output}: it must be a .png file in a folder that exists")
    notes = Console(stderr=True)
    with notes.status("embedding real digits"):
        result = run_demo(Embedder.load(bundle), seed)
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
            showcase.example.family, showcase.question, detail.route.value, f"{detail.gate_score:.3f}",
            (detail.rationale or "-").replace(";", "; "), f"[{'green' if showcase.found else 'red'}]{found}",
        )  # fmt: skip
    console.print(shown)
    modes = Table(title=f"{len(result.modes['auto'].hits_Q)} queries of mixed traffic")
    for column in ("mode", "hit@1", "rationale tokens", "median ms alone", "reasoning rate"):
        modes.add_column(column, justify="left" if column == "mode" else "right")
    for mode, summary in summaries.items():
        modes.add_row(
            mode, f"{summary['hit_at_1']:.3f}", f"{summary['rationale_tokens']:.2f}", f"{summary['p50_ms']:.2f}",
            f"{summary['reasoning_rate']:.0%}",
        )  # fmt: skip
    console.print(modes)
    console.print(f"picture: {output}")
