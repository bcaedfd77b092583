"""A progress bar for people, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def counting(total: int, *, shown: bool, label: str = "embedding") -> Generator[Callable[[int], None]]:
    """Yield a function that counts finished inputs, on a rich progress bar where `shown`."""
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
