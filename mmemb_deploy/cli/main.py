"""The application `mmemb` and its exit codes. Other packages add commands by the entry point group "mmemb.commands"."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated

import typer

import mmemb_deploy
from mmemb_deploy.cli import bundle, embed, search
from mmemb_deploy.errors import MmembError
from mmemb_deploy.serve import command as serve

COMMANDS = "mmemb.commands"  # each entry is `register(app: typer.Typer) -> None`


def application() -> typer.Typer:
    """Return `mmemb` with the commands of every package that is installed."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Embed text, images, video and documents, reasoning only where it helps.",
    )
    app.callback(invoke_without_command=True)(version)
    for group in (embed, search, bundle, serve):
        group.register(app)
    for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        entry.load()(app)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `mmemb` on the command line's arguments, or on these.

    Exit code 2 for a user's mistake, 130 when interrupted, 1 for a defect.
    """
    try:
        application()(arguments)
    except MmembError as error:
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True, highlight=False).print("[bold red]error:[/]", escape(str(error)), soft_wrap=True)
        if "--json" in (sys.argv if arguments is None else arguments):
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        raise SystemExit(2) from error


def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Embed text, images, video and documents, reasoning only where it helps."""
    if show:
        print(mmemb_deploy.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
