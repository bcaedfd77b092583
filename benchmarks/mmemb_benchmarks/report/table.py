"""One table of figures, and what is read and written alike in all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemb_benchmarks.results import Stamped

MODES = "never", "auto", "always"  # in the order in which tables show them


@dataclass(frozen=True)
class Table:
    """Some figures; `caption` says when they were measured, on what, and by which command."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @property
    def markdown(self) -> str:
        """The table in Markdown, without its caption."""
        head, *rows = (f"| {' | '.join(row)} |\n" for row in (self.head, *self.rows))
        return "".join([head, "|---" * len(self.head), "|\n", *rows])


def read_json(path: Path) -> Any:
    """Read a result that no class describes."""
    return json.loads(path.read_text(encoding="utf-8"))


def caption(result: dict[str, Any], *commands: str) -> str:
    """Say when a result was measured, on what, and by which commands, its own by default."""
    told = (f"`{command}`" for command in commands or (result["command"],))
    return "; ".join([result["date"], result["device"], *told])


def caption_of(results: Sequence[Stamped[Any]]) -> str:
    """Say so of several results."""
    dates = ", ".join(sorted({result.date for result in results}))
    devices = ", ".join(sorted({result.machine.device for result in results}))
    return caption({"date": dates, "device": devices}, *(result.command for result in results))


def side_by_side(figures: Iterable[float], form: str) -> str:
    """Return figures in one cell."""
    return " / ".join(format(figure, form) for figure in figures)
