"""The commands `mmemb search` and `mmemb index`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmemb_deploy.cli.options import Backend, Device, Digest, Json, Threads
from mmemb_deploy.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.search.vectors import Hit

Stored = Annotated[Path, typer.Argument(metavar="VECTORS", help="What mmemb embed wrote, .npz or .parquet.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(search)
    app.command()(index)


def search(
    stored: Stored,
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to look for, alone or beside words.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="The bundle that made VECTORS; nano by default.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits to show.")] = 5,
    reasoning: Annotated[str | None, typer.Option(help="auto, never or always.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What to search for; the bundle's by default.")] = None,
    indexed: Annotated[bool, typer.Option("--index", help="Search by what mmemb index wrote.")] = False,
    rescore: Annotated[
        Path | None, typer.Option(help="The same job's output in another precision, which gives the final scores.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Also write the hits as one page to look at, .html.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="What was embedded, where --page finds the files; VECTORS' folder by default.")
    ] = None,
    backend: Backend = "auto",
    device: Device = 0,
    threads: Threads = None,
    digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Search vectors for words, a picture, or both."""
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.search.page import write_page
    from mmemb_deploy.search.vectors import Vectors

    if query is None and image is None:
        raise OptionError("there is nothing to look for: pass QUERY, --image, or both")
    if page is not None and (page.suffix != ".html" or not page.parent.is_dir()):
        raise OptionError(f"page is {page}: it must be a .html file in a folder that exists")
    vectors = Vectors.open(stored, index=indexed, rescore=rescore)
    embedder = Embedder.load(bundle, backend=backend, device=device, threads=threads, digest=digest)
    truncate_dim = vectors.fit(embedder)
    for note in (embedder.notes[0], vectors.note(embedder)):
        if note is not None:
            print(note, file=sys.stderr)
    (hits,) = vectors.search(_embedded(embedder, query, image, reasoning, instruction, truncate_dim), k)
    if page is not None:
        note = f"the nearest {len(hits)} of {len(vectors)} in {stored.name}, with their cosines"
        write_page(page, query, image, hits, source or stored.parent, embedder.manifest.limits, note)
    if as_json:
        asked = {"text": query, "image": None if image is None else str(image)}
        print(json.dumps({"query": asked, "hits": [asdict(hit) for hit in hits]}))
    else:
        _show(hits)


def _embedded(
    embedder: Embedder,
    query: str | None,
    image: Path | None,
    reasoning: str | None,
    instruction: str | None,
    truncate_dim: int | None,
) -> NDArray[Any]:
    """Embed a query, (1, dim); a picture alone as what is searched is embedded, so that like is compared with like."""
    from mmemb_deploy.options import EncodeOptions

    options: EncodeOptions = {"truncate_dim": truncate_dim}
    if reasoning is not None:
        options["reasoning"] = reasoning
    if instruction is not None:
        options["instruction"] = instruction
    if query is None:
        return embedder.encode_document([{"image": image}], **options)
    return embedder.encode([query if image is None else {"text": query, "image": image}], **options)


def _show(hits: list[Hit]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mmemb_deploy.search.page import place

    shown = {
        "score": [f"{hit.score:.3f}" for hit in hits],
        "file": [escape(hit.file) for hit in hits],
        "where": [place(hit) for hit in hits],
        "id": ["" if hit.id == hit.file else escape(hit.id) for hit in hits],
    }
    said = {heading: words for heading, words in shown.items() if any(words)}
    table = Table(*said)
    for row in zip(*said.values(), strict=True):
        table.add_row(*row)
    Console(highlight=False).print(table)


def index(stored: Stored, as_json: Json = False) -> None:
    """Write an index beside vectors, for searches by `mmemb search --index`."""
    from mmemb_deploy.progress import counting
    from mmemb_deploy.search.index import index_path
    from mmemb_deploy.search.vectors import Vectors

    vectors = Vectors.open(stored)
    with counting(len(vectors), shown=not as_json, label="indexing") as done:
        size = vectors.build_index(done)
    if as_json:
        print(json.dumps({"output": str(index_path(stored)), "rows": len(vectors), "bytes": size}))
    else:
        print(f"{index_path(stored)}: {len(vectors)} rows, {size / 2**20:.1f} MiB")
