"""Progress bars of builds, on standard error: one for every phase that is under way."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from mmemb_deploy.backends.tensorrt.network import Watcher
from mmemb_engines.build import Watch


class Silent:
    """A watcher that shows nothing."""

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """Ignore a phase that begins."""

    def stepped(self, phase: str, step: int) -> None:
        """Ignore a step."""

    def finished(self, phase: str) -> None:
        """Ignore a phase that ends."""


@contextmanager
def watching(*, shown: bool) -> Generator[Watch]:
    """Yield a function from a graph's name to the watcher of its build; bars appear where `shown`."""
    if not shown:
        yield lambda _: Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        class Bars:
            def __init__(self, graph: str) -> None:
                self._graph = graph
                self._tasks: dict[str, TaskID] = {}

            def started(self, phase: str, parent: str | None, steps: int) -> None:
                name = f"{self._graph}: {phase}" if parent is None else f"  {phase}"
                self._tasks[phase] = progress.add_task(name, total=steps)

            def stepped(self, phase: str, step: int) -> None:
                progress.update(self._tasks[phase], completed=step + 1)

            def finished(self, phase: str) -> None:
                progress.remove_task(self._tasks.pop(phase))

        def watch(graph: str) -> Watcher:
            return Bars(graph)

        yield watch
