"""The command `mmemb eval mmeb-v2`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_benchmarks.commands.shared import BatchSize
from mmemb_deploy.cli.options import Backend, Bundle, Device, Json, Threads

if TYPE_CHECKING:
    from mmemb_benchmarks.mmeb_v2.tasks import Task


def register(app: typer.Typer) -> None:
    """Add the group `mmemb eval`."""
    group = typer.Typer(no_args_is_help=True, help="Evaluate a bundle on public benchmarks, from local folders.")
    group.callback()(_group)
    group.command("mmeb-v2")(mmeb_v2)
    app.add_typer(group, name="eval")


def _group() -> None:
    """Evaluate a bundle on public benchmarks, from local folders."""


def mmeb_v2(
    data: Annotated[Path, typer.Option(help="Root of image-tasks/, video-tasks/ and visdoc-tasks/.")],
    bundle: Bundle = None,
    backend: Backend = "auto",
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A task, a group (video) or a sub-group (video/QA); again for more. All that lie in --data."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results; a run that was interrupted goes on.")] = Path("mmeb-v2"),
    modes: Annotated[str, typer.Option(help="Of never, always and auto, with commas.")] = "never,always,auto",
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of a video; 8 by default, like the benchmark's authors.")
    ] = None,
    max_queries: Annotated[
        int | None, typer.Option(min=1, help="Only so many queries of each task: a trial, not a score.")
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Download annotations that are absent. Media are not.")] = False,
    batch_size: BatchSize = 32,
    device: Device = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score MMEB-V2's 78 tasks without, with and by choice of reasoning, with the public metrics and files."""
    from functools import partial

    from rich.console import Console
    from rich.progress import Progress

    from mmemb_benchmarks.mmeb_v2.evaluate import MODES, Evaluation
    from mmemb_benchmarks.mmeb_v2.readers import download_annotations, has_annotations, read_task
    from mmemb_benchmarks.mmeb_v2.table import Results
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.errors import check_known
    from mmemb_deploy.files import write_whole

    asked = list(dict.fromkeys(modes.split(",")))
    for mode in asked:
        check_known("mode", mode, MODES)
    chosen = _chosen(tasks, data, hub=hub)
    embedder = Embedder.load(bundle, backend=backend, device=device, threads=threads)
    notes = Console(stderr=True)
    try:
        with Progress(console=notes, transient=True) as progress:
            for number, task in enumerate(chosen, start=1):
                if hub and not has_annotations(task, data):
                    download_annotations(task, data)
                read = read_task(task, data, frames=frames)
                if max_queries is not None:
                    read = read.first(max_queries, row_scope=task.scope == "row")
                total = len(read.corpus) + len(asked) * len(read.queries)
                bar = progress.add_task(f"{task.name}, {number} of {len(chosen)}", total=total)
                evaluation = Evaluation(embedder, task, read, out, batch_size, partial(progress.advance, bar))
                for mode, figures in evaluation.run(asked).items():
                    notes.print(f"{task.name} {mode}: {task.metric} {100 * figures[task.metric]:.1f}")
                    if lost := int(figures["num_unanswerable"]):
                        notes.print(f"  {lost} queries have no right answer among their candidates: they count 0")
                progress.remove_task(bar)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    results = Results.of(out, asked)
    figures = results.as_json()
    write_whole(out / "table.json", json.dumps(figures, indent=4) + "\n")
    write_whole(out / "table.md", results.markdown())
    if as_json:
        print(json.dumps(figures))
        return
    Console().print(results.rich())
    print(f"{out}: table.md, table.json, and the public files of every task in {', '.join(asked)}")


def _chosen(names: Sequence[str] | None, data: Path, *, hub: bool) -> list[Task]:
    """Return the named tasks, or by default those whose annotations are there: all, where they may be downloaded.

    Raises OptionError for unknown names, for a root that is no folder, and where no task's annotations are there.
    """
    from mmemb_benchmarks.mmeb_v2.readers import has_annotations
    from mmemb_benchmarks.mmeb_v2.tasks import TASKS, select
    from mmemb_deploy.errors import OptionError

    if not data.is_dir():
        raise OptionError(f"--data is {data}, which is not a folder: pass the root of the benchmark's data")
    if names:
        return select(names)
    found = [task for task in TASKS.values() if hub or has_annotations(task, data)]
    if not found:
        first = next(iter(TASKS.values()))
        raise OptionError(
            f"--data {data} holds the annotations of no task: put them there, those of {first.name} into "
            f"{data / first.annotations}, or pass --hub to download them"
        )
    return found
