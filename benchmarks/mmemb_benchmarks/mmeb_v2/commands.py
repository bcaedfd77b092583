"""The command `mmemb eval mmeb-v2`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmemb_benchmarks.commands.shared import Backend, BatchSize, Bundle, Json, Threads


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
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score MMEB-V2's 78 tasks without, with and by choice of reasoning, with the public metrics and files."""
    from rich.console import Console

    from mmemb_benchmarks.mmeb_v2.job import MODES
    from mmemb_benchmarks.mmeb_v2.run import RunOptions, chosen_tasks, run_tasks
    from mmemb_benchmarks.mmeb_v2.table import Results
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.errors import check_known
    from mmemb_deploy.files import write_whole

    asked = list(dict.fromkeys(modes.split(",")))
    for mode in asked:
        check_known("mode", mode, MODES)
    options = RunOptions(
        data=data, out=out, modes=tuple(asked), frames=frames, max_queries=max_queries, hub=hub, batch_size=batch_size
    )
    chosen = chosen_tasks(tasks, options)
    notes = Console(stderr=True)
    try:
        run_tasks(Embedder.load(bundle, backend=backend, threads=threads), chosen, options, notes)
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
