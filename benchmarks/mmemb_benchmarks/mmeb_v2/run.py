"""From the command's options to scores on disk: which tasks, read one after the other, embedded and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mmemb_benchmarks.mmeb_v2.data import TaskData
from mmemb_benchmarks.mmeb_v2.job import TaskJob
from mmemb_benchmarks.mmeb_v2.readers import download_annotations, has_annotations, read_task
from mmemb_benchmarks.mmeb_v2.tasks import TASKS, Task, select
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How tasks are run."""

    data: Path
    """The root under which `Task.annotations` and `Task.media` lie."""

    out: Path
    modes: tuple[str, ...]
    frames: int | None = None
    """Frames of a video; None takes the benchmark's own number."""

    max_queries: int | None = None
    """Leading queries of each task; None takes all."""

    hub: bool = False
    """Whether absent annotations are downloaded."""

    batch_size: int = 32


def chosen_tasks(names: Sequence[str] | None, options: RunOptions) -> list[Task]:
    """Return the named tasks, or by default those whose annotations are there: all, where they may be downloaded.

    Raises OptionError for unknown names, for a root that is no folder, and where no task's annotations are there.
    """
    if not options.data.is_dir():
        raise OptionError(f"--data is {options.data}, which is not a folder: pass the root of the benchmark's data")
    if names:
        return select(names)
    found = [task for task in TASKS.values() if options.hub or has_annotations(task, options.data)]
    if not found:
        first = next(iter(TASKS.values()))
        raise OptionError(
            f"--data {options.data} holds the annotations of no task: put them there, those of {first.name} into "
            f"{options.data / first.annotations}, or pass --hub to download them"
        )
    return found


def run_tasks(embedder: Embedder, tasks: Sequence[Task], options: RunOptions, console: Console) -> None:
    """Evaluate tasks in all modes into `options.out`; progress and remarks go to the console."""
    with Progress(console=console, transient=True) as progress:
        for place, task in enumerate(tasks, start=1):
            data = _read(task, options)
            total = len(data.corpus) + len(options.modes) * len(data.queries)
            bar = progress.add_task(f"{task.name}, {place} of {len(tasks)}", total=total)
            done = partial(progress.advance, bar)
            job = TaskJob(embedder, task, data, options.out, options.batch_size, done)
            for mode, figures in job.run(options.modes).items():
                console.print(f"{task.name} {mode}: {task.metric} {100 * figures[task.metric]:.1f}")
                if unanswerable := int(figures["num_unanswerable"]):
                    console.print(f"  {unanswerable} queries have no right answer among their candidates: they count 0")
            progress.remove_task(bar)


def _read(task: Task, options: RunOptions) -> TaskData:
    if options.hub and not has_annotations(task, options.data):
        download_annotations(task, options.data)
    data = read_task(task, options.data, frames=options.frames)
    if options.max_queries is None:
        return data
    return data.first(options.max_queries, row_scope=task.scope == "row")
