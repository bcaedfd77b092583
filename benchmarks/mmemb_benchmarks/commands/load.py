"""The commands that measure a server under load: `load` and `overload`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_benchmarks.commands.shared import (
    BatchSize,
    Environments,
    Here,
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
from mmemb_deploy.errors import OptionError, check_known

if TYPE_CHECKING:
    from mmemb_benchmarks.measure.load import LoadResult
    from mmemb_benchmarks.measure.overload import OverloadResult

STATIC, TWO_ROUTES = "static", "two-route"
OURS = "mmemb serve"
NEVER = "never"
MODES = NEVER, "auto", "always"

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
        typer.Option(
            "--server", help="URL of a running server with OpenAI's /v1/embeddings; several beside each other."
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Another server of the same weights, beside `mmemb serve`; repeat it, or 'all'."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder, which peers serve: the bundle was exported from it.")
    ] = None,
    environments: Environments = None,
    here: Here = False,
    modes: Annotated[list[str] | None, typer.Option("--mode", help="never, auto, always; all by default.")] = None,
    batch_size: BatchSize = 32,
    device: Device = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Find the rate of random arrivals at which never, auto and always still answer in time.

    The bundle runs the loops, and judges what servers answer: give the one that they serve. Peers embed and do not
    reason: with --peer, pass --mode never and inputs that are texts.
    """
    import asyncio

    from rich.console import Console

    from mmemb_benchmarks.measure.latency import mode_options
    from mmemb_benchmarks.measure.load import Traffic, measure_load
    from mmemb_benchmarks.measure.targets import (
        AnyTarget,
        Server,
        StaticBatches,
        TwoRoutes,
        least_cosine,
        opened,
        prompt_body,
    )
    from mmemb_benchmarks.peers.contest import ROUNDED
    from mmemb_benchmarks.peers.process import PeerError, default_folder
    from mmemb_benchmarks.peers.servers import own, served, text_checkpoint
    from mmemb_benchmarks.results import stamp
    from mmemb_benchmarks.workload import Workload, assemble, load_uncached, threshold_of_rate

    check_output(output)
    names = _peer_names(peers, checkpoint, modes)
    chosen = loops if loops is not None else [] if servers or names else [TWO_ROUTES, STATIC]
    for loop in chosen:
        check_known("loop", loop, (TWO_ROUTES, STATIC))
    for mode in modes or []:
        check_known("mode", mode, MODES)
    embedder = assemble(*load_uncached(bundle, backend, threads, device))
    drawn = Workload.of(embedder, requests=requests, pairs=pairs, kind=kind, queries=queries, seed=seed)
    options = mode_options(threshold_of_rate(embedder, drawn, reasoning_rate), max_rationale_tokens)

    report = Console(stderr=True).print
    traffic = Traffic.of(embedder, drawn, burst=burst, seed=seed)
    wanted = {mode: options[mode] for mode in modes or MODES}

    async def measure(peer_servers: Mapping[str, str], left_out: dict[str, str]) -> LoadResult:
        targets: dict[str, AnyTarget] = {}
        for loop in chosen:
            make = TwoRoutes if loop == TWO_ROUTES else StaticBatches
            targets[loop] = make(embedder, batch_size)
        targets |= {url: Server(url) for url in servers or []}
        body = prompt_body(embedder)
        targets |= {name: Server(url, None if name == OURS else body) for name, url in peer_servers.items()}
        async with opened(targets):
            cosines = {
                name: await least_cosine(targets[name], embedder, traffic.asks(wanted[NEVER])[:4])
                for name in peer_servers
            }
            for name, cosine in cosines.items():
                if cosine < ROUNDED:
                    left_out[name] = f"its embedding is not ours: cosine {cosine:.6f}, below {ROUNDED}"
            found = await measure_load(
                {name: target for name, target in targets.items() if name not in left_out},
                embedder,
                traffic,
                wanted,
                target_ms=p95_ms,
                seconds=seconds,
                trials=trials,
                batch_size=batch_size,
                report=report,
            )
        return found.model_copy(update={"cosines": cosines, "left_out": left_out})

    with ExitStack() as running:
        left_out: dict[str, str] = {}
        urls: dict[str, str] = {}
        if names:
            assert checkpoint is not None
            place = None if here else environments or default_folder()
            folder = running.enter_context(text_checkpoint(checkpoint, place))
            urls[OURS] = running.enter_context(own(bundle, threads))
            for name in names:
                report(f"starting {name}")
                try:
                    urls[name] = running.enter_context(served(name, folder, place))
                except PeerError as error:
                    left_out[name] = str(error)
        result = asyncio.run(measure(urls, left_out))
    finish(stamp("load", result, embedder), output=output, as_json=as_json, show=_show_load)


def _peer_names(peers: Sequence[str] | None, checkpoint: Path | None, modes: Sequence[str] | None) -> list[str]:
    """Return the peers that were asked for. Raises OptionError where something that they need is missing."""
    from mmemb_benchmarks.peers.servers import SERVERS

    for name in peers or []:
        check_known("peer", name, [*SERVERS, "all"])
    names = list(SERVERS) if "all" in (peers or []) else list(peers or [])
    if names and modes != [NEVER]:
        raise OptionError(f"mode is {modes or list(MODES)}: peers embed and do not reason; pass --mode never")
    if names and checkpoint is None:
        raise OptionError(f"peer is {names}: they serve a checkpoint; pass --checkpoint, what the bundle was made of")
    return names


def _show_load(result: LoadResult) -> None:
    from rich.console import Console

    from mmemb_benchmarks.results import digits

    shown = table(
        f"requests a second with p95 below {digits(result.target_p95_ms)} ms; {result.source}",
        *("target", "mode", "sustained", "broke at", "times always", "reasoned", "hit@1"),
        left=2,
    )
    for target, modes in result.targets.items():
        always = modes["always"].sustainable_per_s if "always" in modes else 0.0
        for name, mode in modes.items():
            held = mode.highest
            figures = (
                mode.sustainable_per_s,
                mode.broke_per_s,
                mode.sustainable_per_s / always if always else None,
                None if held is None else held.reasoned,
                None if held is None else held.hit_at_1,
            )
            shown.add_row(target, name, *("-" if figure is None else digits(figure) for figure in figures))
        shown.add_section()
    console = Console()
    console.print(shown)
    console.print("; ".join(f"{name} {ratio:.2f}" for name, ratio in result.ratio.items() if ratio is not None))
    for name, reason in result.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False)


def overload(
    bundle: Bundle = None,
    backend: Backend = "auto",
    pairs: Pairs = None,
    kind: Kind = None,
    queries: Queries = 400,
    seed: Seed = 0,
    p95_ms: Target = None,
    max_rationale_tokens: Written = None,
    seconds: Annotated[float, typer.Option(min=1, help="Length of a level of load.")] = 60.0,
    trials: Trials = 8,
    patience_ms: Annotated[
        float | None,
        typer.Option(min=0.1, help="What an input may wait before load is high; an eighth of p95's target."),
    ] = None,
    burst: Burst = 1.0,
    batch_size: BatchSize = 32,
    device: Device = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Ask the two-route loop for up to twice what it sustains, for deadlines, and for both routes at once."""
    import asyncio

    from rich.console import Console

    from mmemb_benchmarks.measure.latency import mode_options
    from mmemb_benchmarks.measure.load import Traffic
    from mmemb_benchmarks.measure.overload import measure_overload
    from mmemb_benchmarks.results import stamp
    from mmemb_benchmarks.workload import Workload, assemble, load_uncached, threshold_of_rate

    check_output(output)
    embedder = assemble(*load_uncached(bundle, backend, threads, device))
    drawn = Workload.of(embedder, pairs=pairs, kind=kind, queries=queries, seed=seed)
    found = asyncio.run(
        measure_overload(
            embedder,
            Traffic.of(embedder, drawn, burst=burst, seed=seed),
            mode_options(threshold_of_rate(embedder, drawn, None), max_rationale_tokens),
            target_ms=p95_ms,
            seconds=seconds,
            trials=trials,
            batch_size=batch_size,
            patience_ms=patience_ms,
            report=Console(stderr=True).print,
        )
    )
    finish(stamp("overload", found, embedder), output=output, as_json=as_json, show=_show_overload)


def _show_overload(result: OverloadResult) -> None:
    from rich.console import Console

    from mmemb_benchmarks.results import digits

    console = Console()

    def show(title: str, rows: Sequence[Mapping[str, float | None]]) -> None:
        shown = table(title, *rows[0])
        for row in rows:
            shown.add_row(*("-" if figure is None else digits(figure) for figure in row.values()))
        console.print(shown)

    sustained = ", ".join(f"{mode} {digits(rate)}" for mode, rate in result.sustained_per_s.items())
    console.print(f"{result.source}; p95 below {digits(result.target_p95_ms)} ms sustains {sustained} a second")
    show(
        f"times what auto sustains, {digits(result.seconds)} s each; hit@1 by load and of other choices",
        [
            {
                "load": level.load,
                "a second": level.trial.rate_per_s,
                "threshold": level.trial.threshold,
                "reasoned": level.trial.reasoned,
                "hit@1": level.trial.hit_at_1,
                "random": level.random,
                "oracle": level.oracle,
                "never": level.never,
                "auto": level.auto,
                "p95, ms": level.trial.p95_ms,
                "refused": level.trial.refused,
            }
            for level in result.levels
        ],
    )
    recovered = "not within the last level" if result.recovery_s is None else f"within {digits(result.recovery_s)} s"
    console.print(f"after the overload p95 of a second of requests is below the target {recovered}")
    show(
        "always, by a deadline; shares of the requests",
        [
            {
                "deadline, ms": row.deadline_ms,
                "of the idle mean": row.times_idle,
                "reasoned": row.reasoned,
                "direct": row.direct,
                "refused": row.refused,
                "late, said": row.late,
                "unsaid": row.unsaid,
            }
            for row in result.deadlines
        ],
    )
    mixed = result.mixed
    console.print(
        f"without reasoning p95 is {digits(mixed.p95_ms)} ms while as many others reason, {digits(mixed.rate_per_s)} a "
        f"second together, and {digits(mixed.alone_p95_ms)} ms alone, {digits(mixed.alone_per_s)} a second, each at "
        f"{mixed.utilisation:.0%} of what full batches reach: {mixed.ratio:.2f} times"
    )
