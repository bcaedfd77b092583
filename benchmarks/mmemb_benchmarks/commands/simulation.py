"""The command that simulates fleets: `simulate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_benchmarks.commands.shared import Out, Pairs, Queries, Seed, check_output, finish, table
from mmemb_deploy.cli.options import Backend, Bundle, Device, Json, Threads

if TYPE_CHECKING:
    from mmemb_benchmarks.simulation.study import SimulationResult

SIZES = (1, 3, 10, 30, 100, 300, 1000)


def simulate(
    bundle: Bundle = None,
    backend: Backend = "auto",
    pairs: Pairs = None,
    queries: Queries = 300,
    seed: Seed = 0,
    sizes: Annotated[list[int] | None, typer.Option("--replicas", min=1, help=f"Repeatable; {SIZES} if none.")] = None,
    load: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of what one replica reaches in full batches.")
    ] = 0.5,
    validated: Annotated[
        list[float] | None, typer.Option("--validate", help="Loads at which one replica is run for real; repeatable.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a real run.")] = 8.0,
    device: Device = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Simulate 1 to 1,000 replicas by the server's own scheduler and measured costs; run one for real beside it.

    On a CPU an engine has one thread by default, whose own seconds are counted, whatever else the machine does.
    """
    from rich.console import Console

    from mmemb_benchmarks.results import stamp
    from mmemb_benchmarks.simulation.study import simulate as study
    from mmemb_benchmarks.workload import Workload, assemble, load_uncached
    from mmemb_deploy.errors import OptionError

    check_output(output)
    embedder = assemble(*load_uncached(bundle, backend, threads, device))
    if threads is None and embedder.backend.endswith("CPU"):
        embedder = assemble(*load_uncached(bundle, backend, 1, device))
    if embedder.paths.lane is not None:
        raise OptionError(f"--threads is {threads}: two runs at once are not simulated; pass 1")
    if not embedder.reasons:
        raise OptionError(f"{embedder.manifest.model.name} does not reason: there is no second route to simulate")
    found = study(
        embedder,
        Workload.of(embedder, pairs=pairs, queries=queries, seed=seed),
        sizes=sizes or SIZES,
        load=load,
        validated=(0.2, 0.5) if validated is None else validated,
        seconds=seconds,
        seed=seed,
        report=Console(stderr=True).print,
    )
    finish(stamp("simulation", found, embedder), output=output, as_json=as_json, show=_show)


def _show(found: SimulationResult) -> None:
    from rich.console import Console

    console = Console()
    checked = table("one replica: simulated over real", "load", "against", "p50", "p95", "reasoned")
    for each in found.validation:
        for name, ratio in (("scheduler", each.to_scheduled), ("service", each.to_served)):
            checked.add_row(f"{each.load:.0%}", name, *(f"{value:.2f}" for value in ratio.values()))
    console.print(checked)
    scaled = table(
        "simulated: the same load for each replica",
        "replicas",
        "router",
        "p50, ms",
        "p95, ms",
        "reasoned",
        "busy",
        left=2,
    )
    for router, points in found.weak_scaling.items():
        for point in points:
            scaled.add_row(
                str(point.replicas),
                router,
                f"{point.p50_ms:.1f}",
                f"{point.p95_ms:.1f}",
                f"{point.reasoned:.1%}",
                f"{point.utilisation or 0:.0%}",
            )
    console.print(scaled)
    surges = table(
        "simulated: a surge",
        "second",
        "replicas",
        "arrivals",
        "p95, ms",
        "reasoned",
        "p95 of a fixed fleet",
        "reasoned",
    )
    for scaling, fixed in list(zip(found.surge["autoscaled"], found.surge["fixed"], strict=True))[::3]:
        surges.add_row(
            str(scaling.second),
            str(scaling.replicas),
            f"{scaling.rate_per_s:.0f}",
            f"{scaling.p95_ms:.0f}",
            f"{scaling.reasoned:.1%}",
            f"{fixed.p95_ms:.0f}",
            f"{fixed.reasoned:.1%}",
        )
    console.print(surges)
    dead = found.deaths
    console.print(
        f"simulated: of {dead.requests} requests at {dead.replicas} replicas, 3 of which died, {dead.retried} were "
        f"retried and {dead.lost} lost; p95 {dead.p95_ms:.0f} ms"
    )
