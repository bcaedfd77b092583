"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmemb_deploy.backends.choose import BACKENDS
from mmemb_deploy.errors import OptionError

Bundle = Annotated[Path | None, typer.Argument(help="Bundle folder; the embedded nano bundle by default.")]
Former = Annotated[Path | None, typer.Option("--bundle", hidden=True)]  # where the bundle used to be an option
Backend = Annotated[str, typer.Option(help=f"The engine that runs the bundle: {', '.join(BACKENDS)}.")]
Device = Annotated[int, typer.Option(min=0, help="Index of the GPU, among those that the process sees.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of one operator on a CPU; all cores by default.")]
Digest = Annotated[
    str | None, typer.Option(help="What `mmemb inspect` prints of the bundle; any other bundle is refused.")
]
Data = Annotated[str, typer.Option(help="'digitchain', or JSON lines of query, candidates, relevant.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, for scripts.")]


def same_bundle(bundle: Path | None, former: Path | None) -> Path | None:
    """Return the bundle, however it was given. Raises OptionError where two were."""
    if bundle is not None and former is not None:
        raise OptionError(f"two bundles are given, {bundle} and {former}: pass one, as the argument")
    return former if bundle is None else bundle
