"""Figures that say where they come from, and tables of them for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SCALES = {
    "B": (2**30, ",.2f", "GiB"),
    "FLOP": (1e15, ",.3g", "PFLOP"),
    "FLOP/s": (1e12, ",.1f", "TFLOP/s"),
    "s": (1e-3, ",.2f", "ms"),
}


class Figure(NamedTuple):
    """A value in "", "B", "FLOP", "FLOP/s", "s" or "h", None where it is not known, and how it was found."""

    value: float | None
    unit: str
    basis: str

    def __str__(self) -> str:
        """Return the value in a unit of its size."""
        if self.value is None:
            return "not known"
        whole = (1, ",.0f" if self.value == round(self.value) else ",.2f", self.unit)
        scale, form, unit = SCALES.get(self.unit, whole)
        if unit == "GiB" and 0 < self.value < scale / 10:
            scale, unit = scale / 1024, "MiB"
        return f"{self.value / scale:{form}} {unit}".rstrip()


def figure_table(title: str, sections: Mapping[str, Mapping[str, Figure]]) -> Any:
    """Return rich's table of figures, by section and name."""
    from rich.table import Table

    table = Table(title=title)
    for heading, justify in (("", "left"), ("", "right"), ("from", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # the literals above
    for section, figures in sections.items():
        table.add_section()
        table.add_row(f"[bold]{section}[/bold]")
        for name, figure in figures.items():
            table.add_row(name, str(figure), figure.basis)
    return table
