"""The command `peers`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_benchmarks.commands.shared import Environments, Here, Out, Rounds, check_output, finish, table
from mmemb_deploy.cli.options import Json

if TYPE_CHECKING:
    from mmemb_benchmarks.peers.contest import PeersResult


def peers(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, which the peers run.")],
    bundles: Annotated[list[Path], typer.Argument(help="Bundles that were exported from it.")],
    peer: Annotated[
        list[str] | None,
        typer.Option(help="A peer beside transformers; repeat for several, or 'all'. They lie in memory together."),
    ] = None,
    environments: Environments = None,
    here: Here = False,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of a prompt.")] = 256,
    batch: Annotated[list[int], typer.Option(min=1, help="Prompts that run together; repeat for several.")] = [1, 8],  # noqa: B006
    written: Annotated[int, typer.Option(min=8, help="Tokens written after each prompt.")] = 32,
    rounds: Rounds = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every contender on a CPU.")] = 2,
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Run the same weights elsewhere, each peer in its own environment, parity first, then times in turns."""
    from rich.console import Console

    from mmemb_benchmarks.peers.contest import contest, peers_on
    from mmemb_benchmarks.peers.process import default_folder
    from mmemb_benchmarks.results import stamp
    from mmemb_deploy.errors import check_known

    check_output(output)
    check_known("device", device, ("cpu", "cuda"))
    known = peers_on(device)
    for name in peer or []:
        check_known(f"peer on {device}", name, [*known, "all"])
    names = known if "all" in (peer or []) else peer or []
    folder = None if here else environments or default_folder()
    found = contest(
        checkpoint,
        bundles,
        names=names,
        environments=folder,
        device=device,
        tokens=tokens,
        batches=batch,
        written=written,
        rounds=rounds,
        threads=threads,
        report=Console(stderr=True).print,
    )
    finish(stamp("peers", found, None), output=output, as_json=as_json, show=_show)


def _show(result: PeersResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console

    from mmemb_benchmarks.results import digits

    console, base = Console(), result.peers[result.baseline].seconds
    title = f"{result.tokens} tokens: seconds of {result.baseline}, and how many times faster others are"
    shown = table(title, "", *base, "cosine", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.columns[0].no_wrap = True
    for name, peer in result.peers.items():
        cells = (
            "-"
            if what not in peer.seconds
            else digits(seconds)
            if name == result.baseline
            else f"{seconds / peer.seconds[what]:.2f}x"
            for what, seconds in base.items()
        )
        shown.add_row(name, *cells, f"{peer.cosine:.4f}")
    console.print(shown)
    for name, reason in result.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False)
