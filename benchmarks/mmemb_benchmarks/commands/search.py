"""The command that measures search: `search`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_benchmarks.commands.shared import Out, Seed, check_output, finish, table
from mmemb_deploy.cli.options import Json

if TYPE_CHECKING:
    from mmemb_benchmarks.measure.search import SearchResult

ROWS = (10_000, 100_000, 1_000_000)
DIMS = (128, 1024)
FEWEST = 32  # queries, of which one batch is made


def search(
    rows: Annotated[list[int] | None, typer.Option(min=1000, help=f"Vectors; repeatable; {ROWS} if none.")] = None,
    dims: Annotated[
        list[int] | None, typer.Option("--dim", min=8, help=f"Values of a vector; repeatable; {DIMS} if none.")
    ] = None,
    queries: Annotated[int, typer.Option(min=FEWEST, help="Queries of each size.")] = 64,
    seed: Seed = 0,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Search drawn vectors exactly, by 8 bits, by signs and by the index, beside numpy and faiss: recall and time.

    A million vectors of 1024 values take 12 GB of memory and 6 GB of the folder for temporary files.
    """
    from rich.console import Console

    from mmemb_benchmarks.measure.search import measure_search
    from mmemb_benchmarks.results import stamp

    check_output(output)
    sizes = [(count, dim) for dim in dims or DIMS for count in rows or ROWS]
    found = measure_search(sizes, queries=queries, seed=seed, report=Console(stderr=True).print)
    finish(stamp("search", found, None), output=output, as_json=as_json, show=_show)


def _show(result: SearchResult) -> None:
    from rich.console import Console

    from mmemb_benchmarks.measure.search import TOGETHER
    from mmemb_benchmarks.results import digits

    console = Console()
    for setting in result.settings:
        shown = table(
            f"{setting.rows} vectors of {setting.dim}; the index took {digits(setting.index_seconds)} s to build",
            *("way", "recall@10", "ms alone", f"ms of {TOGETHER}", "times numpy", "MB"),
        )
        for name, way in setting.ways.items():
            figures = way.recall_at_10, way.alone_ms, way.together_ms, way.times_numpy, way.bytes / 1e6
            shown.add_row(name, *map(digits, figures))
        console.print(shown)
