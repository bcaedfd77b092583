"""What several commands share: their options, how they end, and how their tables look."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from mmemb_deploy.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from mmemb_benchmarks.results import Stamped

R = TypeVar("R")

Requests = Annotated[
    Path | None, typer.Option(help="Inputs, as mmemb embed reads them; DigitChain's mixed traffic by default.")
]
Pairs = Annotated[
    Path | None, typer.Option(help="Pairs, as mmemb calibrate reads them: hits are counted; DigitChain's by default.")
]
Kind = Annotated[
    str | None, typer.Option("--workload", help="Inputs of one kind, such as 'long text', 'image' or 'document page'.")
]
Queries = Annotated[int, typer.Option(min=1, help="Inputs to draw, where no file is given.")]
Seed = Annotated[int, typer.Option(min=0, help="Which examples are drawn.")]
Rate = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of the requests that auto sends to reasoning; the bundle's gate decides."),
]
Written = Annotated[int | None, typer.Option(min=1, help="Tokens of a rationale, at most.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs that run together.")]
Environments = Annotated[
    Path | None, typer.Option(help="Where peers are installed; under the user's cache folder by default.")
]
Here = Annotated[bool, typer.Option("--here", help="Install nothing: run all by this Python.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds that count, after one that warms up.")]
Out = Annotated[Path | None, typer.Option("--out", help="Also write the JSON object to this file.")]


class OldNames(TyperCommand):
    """A command that still takes what it took: `--bundle BUNDLE` for its argument, `--output` for `--out`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Translate the words of a command line before they are parsed."""
        words = (re.sub(r"^--output(?==|$)", "--out", word).removeprefix("--bundle=") for word in args)
        return super().parse_args(ctx, [word for word in words if word != "--bundle"])


def check_output(output: Path | None) -> None:
    """Raise OptionError, before anything is measured, for an output that cannot be written."""
    if output is not None and not output.parent.is_dir():
        raise OptionError(f"--out is {output}: {output.parent} is not a folder; create it first")


def finish(stamped: Stamped[R], *, output: Path | None, as_json: bool, show: Callable[[R], None]) -> None:
    """Write a result where `output` says, then print it as JSON or show what is in it."""
    from mmemb_benchmarks.results import write

    if output is not None:
        write(stamped, output)
    if as_json:
        print(stamped.model_dump_json())
    else:
        show(stamped.result)


def table(title: str, *columns: str, left: int = 1, **style: Any) -> Table:
    """Return an empty table, its first `left` columns of words, the others of figures; `style` is rich's."""
    from rich.table import Table

    made = Table(title=title, **style)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right")
    return made
