"""The command `mmemb export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmemb_deploy.errors import MissingExtraError
from mmemb_export.recipe import FORMS

OF_FORMS = "; ".join(f"{form}: {', '.join(precisions)}" for form, precisions in FORMS.items())


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
    form: Annotated[
        str,
        typer.Option(help="'portable' for every engine, 'fused' for ONNX Runtime alone, faster there and quantisable."),
    ] = "portable",
    precision: Annotated[str, typer.Option(help=f"Of vision and embedder. {OF_FORMS}.")] = "float32",
    generator_precision: Annotated[
        str | None, typer.Option(help="Of the generator; the embedder's unless given.")
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(help="Float type beside int8, fp8 or int4 weights; bfloat16 unless given, float32 if fused."),
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="What the certificate must reach, in place of the precision's own bound.")
    ] = None,
    max_flips: Annotated[
        float | None, typer.Option(help="Share of inputs whose route may differ, in place of the precision's own.")
    ] = None,
    min_token_agreement: Annotated[
        float | None, typer.Option(help="Share of rationale tokens that must agree, in place of the precision's own.")
    ] = None,
    probes: Annotated[int, typer.Option(help="Synthetic inputs to certify on.")] = 200,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate and the gate as JSON.")] = False,
) -> None:
    """Split a checkpoint into the four graphs of a bundle, calibrate its gate, and certify it."""
    try:
        from mmemb_export.recipe import Recipe
        from mmemb_export.write import export_bundle
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    from rich.console import Console

    from mmemb_deploy.evaluation.pairs import held_out_pairs

    pairs = [] if calibrate == "none" else held_out_pairs(calibrate)
    notes = Console(stderr=True)
    recipe = Recipe(
        form=form,
        precision=precision,
        generator_precision=generator_precision,
        compute=compute,
        min_cosine=min_cosine,
        max_flips=max_flips,
        min_token_agreement=min_token_agreement,
    )
    manifest = export_bundle(
        checkpoint,
        bundle,
        recipe=recipe,
        pairs=pairs,
        pairs_name=calibrate,
        probes=probes,
        overwrite=overwrite,
        report=notes.print,
    )
    certificate = manifest.certificate
    assert certificate is not None
    if as_json:
        print(manifest.model_dump_json(include={"certificate", "gate"}))
        return
    console = Console()
    worst = min(parity.min_cosine for parity in certificate.parities.values())
    console.print(f"bundle: {bundle}")
    console.print(
        f"certificate: min cosine {worst:.7f}, token agreement {certificate.token_agreement:.2%}, "
        f"gate flips {sum(parity.gate_flips for parity in certificate.modalities.values())}"
    )
    if manifest.gate is not None:
        console.print(f"gate threshold: {manifest.gate.threshold} (calibrated on: {manifest.gate.calibration})")
