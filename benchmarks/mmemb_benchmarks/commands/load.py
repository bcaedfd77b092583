"""The commands that measure a server under load: `load` and `overload`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_benchmarks.commands.shared import (
    BatchSize,
    Kind,
    Out,
    Pairs,
    Queries,
    Rate,
    Requests,
    Seed,
    Written,
    check_output,
    finish,
    table,
)
from mmemb_benchmarks.measure import FEWEST_REQUESTS, PRECISION, TARGET
from mmemb_deploy.cli.options import Backend, Bundle, Device, Json, Threads
from mmemb_deploy.errors import check_known

if TYPE_CHECKING:
    from mmemb_benchmarks.measure.load import LoadResult

STATIC, TWO_ROUTES = "static", "two-route"
MODES = "never", "auto", "always"

Target = Annotated[
    float | None,
    typer.Option(min=0.001, help=f"What p95 must not exceed; {TARGET} x the slowest mode's idle mean by default."),
]
Seconds = Annotated[
    float,
    typer.Option(
        min=0.1, help=f"Length of a trial; at least {FEWEST_REQUESTS} requests, and {1 / PRECISION:.0f} x --p95-ms."
    ),
]
Trials = Annotated[int, typer.Option(min=1, help="Trials of each mode, at most.")]
Burst = Annotated[float, typer.Option(min=1, help="Requests that arrive together, in the mean.")]


def load(
    bundle: Bundle = None,
    backend: Backend = "auto",
    requests: Requests = None,
    pairs: Pairs = None,
    kind: Kind = None,
    queries: Queries = 400,
    seed: Seed = 0,
    p95_ms: Target = None,
    reasoning_rate: Rate = None,
    max_rationale_tokens: Written = None,
    seconds: Seconds = 5.0,
    trials: Trials = 12,
    burst: Burst = 1.0,
    loops: Annotated[
        list[str] | None,
        typer.Option("--loop", help=f"{TWO_ROUTES}, {STATIC}; both by default, none where there is a --server."),
    ] = None,
    servers: Annotated[
        list[str] | None,
        typer.Option("--server", help="URL of a running server with OpenAI's /v1/embeddings; several beside each other."),
    ] = None,
    modes: Annotated[list[str] | None, typer.Option("--mode", help="never, auto, always; all by default.")] = None,
    batch_size: BatchSize = 32,
    device: Device = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Find the rate of random arrivals at which never, auto and always still answer in time.

    The bundle runs the loops, and judges what servers answer: give the one that they serve.
    """
    import asyncio

    from rich.console import Console

    from mmemb_benchmarks.measure.latency import mode_options
    from mmemb_benchmarks.measure.load import Traffic, measure_load
    from mmemb_benchmarks.measure.targets import Server, StaticBatches, TwoRoutes, opened
    from mmemb_benchmarks.results import stamp
    from mmemb_benchmarks.workload import Workload, assemble, load_uncached, threshold_of_rate

    check_output(output)
    chosen = loops if loops is not None else [] if servers else [TWO_ROUTES, STATIC]
    for loop in chosen:
        check_known("loop", loop, (TWO_ROUTES, STATIC))
    for mode in modes or []:
        check_known("mode", mode, MODES)
    embedder = assemble(*load_uncached(bundle, backend, threads, device))
    drawn = Workload.of(embedder, requests=requests, pairs=pairs, kind=kind, queries=queries, seed=seed)
    options = mode_options(threshold_of_rate(embedder, drawn, reasoning_rate), max_rationale_tokens)
    made = {
        TWO_ROUTES: lambda: TwoRoutes(embedder, batch_size),
        STATIC: lambda: StaticBatches(embedder, batch_size),
    }

    async def measure() -> LoadResult:
        targets = {loop: made[loop]() for loop in chosen} | {url: Server(url) for url in servers or []}
        async with opened(targets):
            return await measure_load(
                targets,
                embedder,
                Traffic.of(embedder, drawn, burst=burst, seed=seed),
                {mode: options[mode] for mode in modes or MODES},
                target_ms=p95_ms,
                seconds=seconds,
                trials=trials,
                batch_size=batch_size,
                report=Console(stderr=True).print,
            )

    finish(stamp("load", asyncio.run(measure()), embedder), output=output, as_json=as_json, show=_show_load)


def _show_load(result: LoadResult) -> None:
    from rich.console import Console

    from mmemb_benchmarks.results import digits

    shown = table(
        f"requests a second with p95 below {digits(result.target_p95_ms)} ms; {result.source}",
        *("target", "mode", "sustained", "broke at", "times always", "reasoned", "hit@1"),
        left=2,
    )
    for target, modes in {result.target: result.modes, **result.beside}.items():
        always = modes["always"].sustainable_per_s if "always" in modes else 0.0
        for name, mode in modes.items():
            held = next((trial for trial in reversed(mode.trials) if trial.held), None)
            figures = (
                mode.sustainable_per_s,
                mode.broke_per_s,
                mode.sustainable_per_s / always if always else None,
                held and held.reasoned,
                held and held.hit_at_1,
            )
            shown.add_row(target, name, *("-" if figure is None else digits(figure) for figure in figures))
        shown.add_section()
    console = Console()
    console.print(shown)
    console.print("; ".join(f"{name} {ratio:.2f}" for name, ratio in result.ratio.items() if ratio is not None))
