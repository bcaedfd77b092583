"""The command `mmemb export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmemb_deploy.errors import MissingExtraError


def register(app: typer.Typer) -> None:
    """Add the export command to `mmemb`."""
    app.command("export")(export)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle folder to write.")],
    calibrate: Annotated[
        str,
        typer.Option(
            help="Held-out pairs for the gate's curve: 'digitchain', a file of JSON lines (query, candidates, "
            "relevant, instruction, group), or 'none' to keep the neutral threshold 0.5."
        ),
    ] = "none",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate and the gate as JSON.")] = False,
) -> None:
    """Split a checkpoint into the four graphs of a bundle, calibrate its gate, and certify it."""
    try:
        from mmemb_export.write import export_bundle
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    from rich.console import Console

    from mmemb_deploy.evaluation import held_out_pairs

    pairs = [] if calibrate == "none" else held_out_pairs(calibrate)
    notes = Console(stderr=True)
    manifest = export_bundle(
        checkpoint, bundle, pairs=pairs, pairs_name=calibrate, overwrite=overwrite, report=notes.print
    )
    certificate = manifest.certificate
    assert certificate is not None
    if as_json:
        print(manifest.model_dump_json(include={"certificate", "gate"}))
        return
    console = Console()
    worst = min(parity.min_cosine for parity in [*certificate.modalities.values(), certificate.reasoned])
    console.print(f"bundle: {bundle}")
    console.print(
        f"certificate: min cosine {worst:.7f}, token agreement {certificate.token_agreement:.2%}, "
        f"gate flips {sum(parity.gate_flips for parity in certificate.modalities.values())}"
    )
    console.print(f"gate threshold: {manifest.gate.threshold} (calibrated on: {manifest.gate.calibration})")
