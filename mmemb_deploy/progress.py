"""A progress bar for people, on standard error: how many of how many, how fast, and for how long yet."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Task

MINUTES = 5  # over which the rate is taken; work is done in batches


@contextmanager
def counting(
    total: int | None, *, shown: bool, label: str = "embedding", unit: str = "rows"
) -> Generator[Callable[[int], None]]:
    """Yield a function that counts finished inputs, on a rich progress bar where `shown`; the total may be unknown."""
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Inputs a second."""

        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} {unit}/s")

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=60 * MINUTES) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
