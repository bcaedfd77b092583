"""The commands that measure `mmemb embed`: `overlap` and `memory`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_benchmarks.commands.shared import BatchSize, Out, Seed, check_output, finish, table
from mmemb_deploy.cli.options import Backend, Bundle, Device, Json, Threads

if TYPE_CHECKING:
    from mmemb_benchmarks.measure.memory import Memory
    from mmemb_benchmarks.measure.overlap import OverlapResult

WIDTH, HEIGHT = 4000, 3000


def overlap(
    bundle: Bundle = None,
    backend: Backend = "auto",
    photos: Annotated[int, typer.Option(min=1, help="JPEGs that are made, each another.")] = 500,
    width: Annotated[int, typer.Option(min=1, help="Pixels of each.")] = WIDTH,
    height: Annotated[int, typer.Option(min=1, help="Pixels of each.")] = HEIGHT,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each way embeds them all.")] = 1,
    prepare_threads: Annotated[int | None, typer.Option(min=1, help="As of mmemb embed.")] = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Measure how long the engine waits for photos: nothing prepared ahead, a chunk, and rows as mmemb embed does."""
    import tempfile
    from collections import defaultdict

    from rich.console import Console

    from mmemb_benchmarks.measure.overlap import measure_overlap, write_photos
    from mmemb_benchmarks.results import stamp
    from mmemb_benchmarks.timing import Spent, timed_engine
    from mmemb_benchmarks.workload import assemble, load_uncached

    check_output(output)
    notes = Console(stderr=True)  # no spinner: its thread would take turns with what is timed
    opened, engine = load_uncached(bundle, backend, threads, device)
    spent: Spent = defaultdict(float)
    embedder = assemble(opened, timed_engine(engine, spent))
    with tempfile.TemporaryDirectory() as folder:
        notes.print(f"making {photos} photos")
        made = Path(folder, "photos")
        made.mkdir()
        write_photos(made, photos, (width, height), seed)
        found = measure_overlap(
            embedder,
            spent,
            made,
            {"batch_size": batch_size},
            prepare_threads=prepare_threads,
            rounds=rounds,
            report=notes.print,
        )
    finish(stamp("overlap", found, embedder), output=output, as_json=as_json, show=_show_overlap)


def memory(
    bundle: Bundle = None,
    backend: Backend = "auto",
    rows: Annotated[
        list[int] | None, typer.Option("--rows", min=1, help="Short texts of a job; 30000 and 1000000 by default.")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine/--no-engine", help="Whether they are embedded, or all get one vector.")
    ] = True,
    suffix: Annotated[str, typer.Option(help=".npz or .parquet, what the job writes.")] = ".npz",
    device: Device = 0,
    threads: Threads = None,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Measure the memory of mmemb embed by the rows of a job, in fresh processes."""
    from rich.console import Console

    from mmemb_benchmarks.measure.memory import measure_memory
    from mmemb_benchmarks.results import stamp
    from mmemb_deploy.bundle.folder import NANO
    from mmemb_deploy.errors import check_known
    from mmemb_deploy.jobs.job import FORMATS

    check_output(output)
    check_known("suffix", suffix, FORMATS)
    found = measure_memory(
        bundle or NANO,
        backend,
        threads,
        device,
        rows or [30_000, 1_000_000],
        suffix,
        has_engine=engine,
        report=Console(stderr=True).print,
    )
    finish(stamp("memory", found, None), output=output, as_json=as_json, show=_show_memory)


def _show_overlap(result: OverlapResult) -> None:
    from rich.console import Console

    from mmemb_benchmarks.results import digits

    size = (
        f"{result.photos} photos of {digits(result.megapixels)} megapixels, {digits(result.mean_bytes / 1e6)} MB each"
    )
    shown = table(f"{size}, {result.rounds} rounds", "prepared", "rows a second", "engine idle", "seconds")
    for name, way in result.ways.items():
        shown.add_row(name, digits(way.rows_per_s), f"{way.idle_share:.0%}", digits(way.seconds))
    Console().print(shown)
    rates = [way.rows_per_s for way in result.ways.values()]
    print(
        f"rows ahead: {digits(rates[-1] / rates[-2])} times a chunk ahead, {digits(rates[-1] / rates[0])} times nothing"
    )


def _show_memory(result: Sequence[Memory]) -> None:
    from rich.console import Console

    from mmemb_benchmarks.results import digits

    made = "with the engine" if result[0].has_engine else "without an engine"
    columns = "reading, s", "embedding, s", "loaded, MB", "peak, MB", "output, MB"
    shown = table(f"short texts, {made}", "rows", *columns)
    for each in result:
        sizes = each.before_bytes, each.peak_bytes, each.output_bytes
        seconds = each.read_seconds, each.embed_seconds
        shown.add_row(str(each.rows), *map(digits, seconds), *(digits(size / 1e6) for size in sizes))
    Console().print(shown)
