"""The commands that measure time: `latency`, `suite`, `startup` and `runtime`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
    Rounds,
    Seed,
    Written,
    check_output,
    finish,
    table,
)
from mmemb_deploy.cli.options import Backend, Bundle, Device, Json, Threads

if TYPE_CHECKING:
    from mmemb_benchmarks.measure.latency import LatencyResult


def latency(
    bundle: Bundle = None,
    backend: Backend = "auto",
    requests: Requests = None,
    pairs: Pairs = None,
    kind: Kind = None,
    queries: Queries = 200,
    seed: Seed = 0,
    reasoning_rate: Rate = None,
    max_rationale_tokens: Written = None,
    rounds: Rounds = 5,
    batch_size: BatchSize = 32,
    device: Device = 0,
    threads: Threads = None,
    energy: Annotated[
        bool | None, typer.Option("--energy/--no-energy", help="Count a GPU's joules; on where a GPU runs the bundle.")
    ] = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Measure never, auto and always side by side: latency alone, throughput in batches, and where the time goes."""
    from collections import defaultdict

    from rich.console import Console

    from mmemb_benchmarks.measure.ceiling import cpu_ceiling, gpu_ceiling
    from mmemb_benchmarks.measure.energy import gpu_joules
    from mmemb_benchmarks.measure.latency import measure_latency, mode_options
    from mmemb_benchmarks.results import stamp
    from mmemb_benchmarks.timing import Spent, timed_engine
    from mmemb_benchmarks.workload import Workload, assemble, load_uncached, threshold_of_rate
    from mmemb_deploy.bundle.work import graph_work
    from mmemb_deploy.machine import cores

    check_output(output)
    notes = Console(stderr=True)  # no spinner: its thread would take turns with what is timed
    opened, engine = load_uncached(bundle, backend, threads, device)
    spent: Spent = defaultdict(float)
    embedder = assemble(opened, timed_engine(engine, spent))
    drawn = Workload.of(embedder, requests=requests, pairs=pairs, kind=kind, queries=queries, seed=seed)
    on_cpu = backend in ("auto", "onnxruntime")
    joules = gpu_joules(device) if (not on_cpu if energy is None else energy) else None
    options = mode_options(threshold_of_rate(embedder, drawn, reasoning_rate), max_rationale_tokens)
    notes.print("measuring what the machine can do")
    precision = opened.manifest.graphs["embedder"].precision
    found = measure_latency(
        embedder,
        spent,
        drawn,
        options,
        ceiling=cpu_ceiling(precision, threads or cores()) if on_cpu else gpu_ceiling(device),
        work={name: graph_work(opened, name) for name in ("embedder", "generator")},
        rounds=rounds,
        batch_size=batch_size,
        joules=joules,
        report=notes.print,
    )
    finish(stamp("latency", found, embedder), output=output, as_json=as_json, show=_show_latency)


def suite(
    bundle: Bundle = None,
    backend: Backend = "auto",
    device: Device = 0,
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
    status = run_suite(Setting(*load_uncached(bundle, backend, threads, device), seconds, passes), output, select)
    if status:
        raise typer.Exit(status)
    shown = table(f"{passes} passes", "benchmark", "median, ms", "p95, ms", "on")
    for benchmark in read_result(output).result:
        shown.add_row(*map(escape, benchmark.row))
    Console().print(shown)
    print(f"results: {output}")


def startup(
    bundle: Bundle = None,
    backend: Backend = "auto",
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes per figure.")] = 7,
    device: Device = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Measure what a fresh process pays: importing the package, and loading a bundle."""
    from mmemb_benchmarks.measure.costs import measure_startup
    from mmemb_benchmarks.results import stamp
    from mmemb_deploy.bundle.folder import NANO

    check_output(output)
    found = measure_startup(bundle or NANO, backend, threads, device, runs=runs)
    finish(stamp("startup", found, None), output=output, as_json=as_json, show=_show_lines)


def runtime(
    bundle: Bundle = None,
    backend: Backend = "auto",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder, which transformers loads in float32 to compare.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Texts of a call.")] = 8,
    written: Annotated[int, typer.Option(min=1, help="Tokens of a rationale, at most.")] = 32,
    rounds: Rounds = 5,
    device: Device = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Measure what the runtime costs and saves beside its graphs: overhead, hand-off, prefix reuse, memory, loading."""
    from rich.console import Console

    from mmemb_benchmarks.measure.costs import measure_loading, measure_runtime
    from mmemb_benchmarks.results import stamp
    from mmemb_deploy.bundle.folder import NANO
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.errors import check_known

    check_output(output)
    check_known("backend whose graphs are timed", backend, ("auto", "onnxruntime", "onnxruntime-cuda"))
    folder = bundle or NANO
    notes = Console(stderr=True)  # no spinner: its thread would take turns with what is timed
    notes.print("loading")
    found = measure_loading(folder, backend, threads, checkpoint, device, runs=3)
    embedder = Embedder.load(folder, backend=backend, device=device, threads=threads)
    found |= measure_runtime(embedder, tokens=tokens, batch=batch, written=written, rounds=rounds, report=notes.print)
    finish(stamp("runtime", found, embedder), output=output, as_json=as_json, show=_show_lines)


def _show_lines(result: Mapping[str, float]) -> None:
    from mmemb_benchmarks.results import digits

    for name, value in result.items():
        print(f"{name:<48} {digits(value)}")


def _show_latency(result: LatencyResult) -> None:
    from rich.console import Console

    from mmemb_benchmarks.results import digits

    console, modes = Console(), result.modes.values()
    shown = table(f"{result.requests} requests alone, {result.rounds} rounds; {result.source}", "", *result.modes)
    rows: dict[str, list[float] | list[float | None]] = {
        "p50, ms": [mode.p50_ms for mode in modes],
        "p95, ms": [mode.p95_ms for mode in modes],
        "p99, ms": [mode.p99_ms for mode in modes],
        "mean, ms": [mode.mean_ms for mode in modes],
        f"a second, in batches of {result.batch_size}": [mode.throughput_per_s for mode in modes],
        "reasoning rate": [mode.reasoning_rate for mode in modes],
        "rationale tokens": [mode.rationale_tokens for mode in modes],
        "hit@1": [mode.hit_at_1 for mode in modes],
        "joules a request": [mode.joules_per_request for mode in modes],
    }
    for label, values in rows.items():
        if None not in values:
            shown.add_row(label, *(digits(value) for value in values if value is not None))
    shown.add_section()
    for stage in result.modes["never"].stages_ms:
        shown.add_row(f"mean ms in {stage}", *(digits(mode.stages_ms[stage]) for mode in modes))
    console.print(shown)
    ceiling = result.ceiling
    console.print(
        f"this machine copies {digits(ceiling.copy_gb_per_s)} GB/s and multiplies {digits(ceiling.matmul_gflop_per_s)} "
        f"GFLOP/s ({ceiling.matmul_type}); alone, prefill reaches {ceiling.prefill_share:.0%} of the latter, "
        f"decoding {ceiling.decode_share:.0%} of the former"
    )
