"""The commands that look at a bundle: `inspect`, `verify` and `calibrate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmemb_deploy.cli.options import Backend, Bundle, Data, Device, Digest, Json, Threads
from mmemb_deploy.errors import OptionError

if TYPE_CHECKING:
    from mmemb_deploy.bundle.certificate import Certificate
    from mmemb_deploy.bundle.manifest import GateFacts


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, verify, calibrate):
        app.command()(command)


def inspect(bundle: Bundle = None, as_json: Json = False) -> None:
    """Show what a bundle is: model, graphs, gate, certificate."""
    from rich.console import Console

    from mmemb_deploy.bundle.folder import NANO
    from mmemb_deploy.bundle.manifest import manifest_digest, read_manifest

    folder = bundle or NANO
    manifest = read_manifest(folder)
    if as_json:
        print(json.dumps({"digest": manifest_digest(folder)} | manifest.model_dump(mode="json")))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{folder}[/], schema {manifest.schema_version}, written by mmemb-deploy {manifest.written_by}")
    console.print(f"[bold]digest[/] {manifest_digest(folder)}")
    for title, part in (("model", manifest.model), ("limits", manifest.batch)):
        console.print(f"[bold]{title}[/] " + ", ".join(f"{name} {value}" for name, value in part.model_dump().items()))
    console.print(f"[bold]prompt[/] {manifest.prompt}")
    for name, facts in manifest.graphs.items():
        console.print(f"[bold]{name}[/] {facts.file}, {facts.precision}")
        for side, tensors in (("in", facts.inputs), ("out", facts.outputs)):
            shown = [f"{tensor.name} ({', '.join(map(str, tensor.shape))})" for tensor in tensors[:6]]
            more = [f"... {len(tensors)} in all"] if len(tensors) > 6 else []
            console.print(f"  {side:<3} " + "  ".join(shown + more), markup=False)
    if manifest.gate is not None:
        console.print(_curve(manifest.gate))
    if manifest.certificate is not None:
        _print_certificate(console, manifest.certificate)


def _curve(gate: GateFacts) -> Any:
    from rich.table import Table

    curve = Table(title=f"gate: default threshold {gate.threshold:.4g}, calibrated on {gate.calibration}")
    for column in ("threshold", "reasoning rate", "quality", "95%", "worst group", "rationale tokens", "latency ms"):
        curve.add_column(column, justify="right")
    for point in gate.curve:
        low, high = point.quality_interval
        style = "bold" if point.threshold == gate.threshold else None
        curve.add_row(
            f"{point.threshold:.2f}",
            f"{point.reasoning_rate:.1%}",
            f"{point.quality:.4f}",
            f"{low:.3f} to {high:.3f}",
            f"{point.worst_group:+.4f}",
            f"{point.rationale_tokens:.2f}",
            f"{point.latency_ms:.2f}",
            style=style,
        )
    return curve


def _print_certificate(console: Any, certificate: Certificate) -> None:
    from rich.table import Table

    table = Table(title=f"certificate: {certificate.runtime} against {certificate.reference}")
    for column in ("embeddings", "inputs", "min cosine", "mean cosine", "gate flips"):
        table.add_column(column, justify="left" if column == "embeddings" else "right")
    for name, parity in certificate.parities.items():
        flips = "-" if name == "reasoned" else str(parity.gate_flips)
        table.add_row(name, str(parity.inputs), f"{parity.min_cosine:.8f}", f"{parity.mean_cosine:.8f}", flips)
    if certificate.batch is not None:
        table.add_row(
            "alone, in a batch", str(certificate.batch.inputs), f"{certificate.batch.min_cosine:.8f}", "", "-"
        )
    console.print(table)
    console.print(
        f"rationale token agreement {certificate.token_agreement:.3%}, nearest neighbour agreement "
        f"{certificate.retrieval_overlap:.3%}, bounds {certificate.bounds.model_dump()}, "
        f"measured on {' '.join(certificate.cpu) or 'a CPU that was not noted'}"
    )


def verify(
    bundle: Bundle = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure a certificate anew, on this machine and by this engine.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(help="A float32 bundle of the same checkpoint to measure against; what BUNDLE keeps by default."),
    ] = None,
    backend: Backend = "auto",
    device: Device = 0,
    threads: Threads = None,
    digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's hashes and certificate, load it, and embed a text and an image by every route it has.

    With --measure, its answers are compared with the reference's, and it fails where a bound of the certificate is
    missed.
    """
    import numpy as np
    from rich.console import Console

    from mmemb_deploy.bundle.folder import NANO
    from mmemb_deploy.bundle.folder import Bundle as OpenBundle
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.errors import CertificateError
    from mmemb_deploy.evaluation import parity

    if reference is not None and not measure:
        raise OptionError("--reference is what --measure measures against: pass both")
    opened = OpenBundle.open(bundle or NANO, digest)
    embedder = Embedder.of_bundle(opened, backend=backend, device=device, threads=threads)
    image = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3)
    inputs = ["a text", {"image": image, "text": "and an image"}]
    for reasoning in ("never", "always") if embedder.reasons else ("never",):
        lengths = np.linalg.norm(embedder.encode(inputs, reasoning=reasoning), axis=1)
        if not np.allclose(lengths, 1, atol=1e-5):
            raise CertificateError(f"embeddings with reasoning={reasoning!r} have lengths {lengths}, not 1")
    measured = None
    if measure:
        against = None if reference is None else OpenBundle.open(reference)
        measured = parity.measure(embedder, parity.reference_of(opened, against), parity.bounds_of(opened))
    if as_json:
        found: dict[str, Any] = {"verified": True, "backend": embedder.backend, "notes": embedder.notes}
        if measured is not None:
            found["certificate"] = measured.model_dump(mode="json")
        print(json.dumps(found))
    else:
        for note in embedder.notes:
            print(note, file=sys.stderr)
        print(f"verified: {len(embedder.manifest.files)} files, the certificate, and a run on {embedder.backend}")
        if measured is not None:
            _print_certificate(Console(highlight=False), measured)
    if measured is not None:
        measured.check()


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, whose manifest is rewritten.")],
    data: Data,
    reasoning_rate: Annotated[float | None, typer.Option(help="Reason on at most this share.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Expect at most this latency per input.")] = None,
    quality: Annotated[float | None, typer.Option(help="Reach at least this hit@1, reasoning least.")] = None,
    backend: Backend = "auto",
    device: Device = 0,
    threads: Threads = None,
    digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Choose a bundle's gate threshold anew, on pairs of your own that it was not trained on.

    Without a target, the threshold is the largest that keeps quality within half a point of the best, and every group
    of pairs whole.
    """
    from rich.console import Console

    from mmemb_deploy.bundle.folder import Bundle as OpenBundle
    from mmemb_deploy.bundle.manifest import manifest_digest, write_manifest
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.evaluation.calibration import Budget, Target
    from mmemb_deploy.evaluation.calibration import calibrate as measure
    from mmemb_deploy.evaluation.pairs import held_out_pairs

    given: dict[Budget, float | None] = {"reasoning_rate": reasoning_rate, "latency_ms": latency_ms, "quality": quality}
    asked = [Target(budget, value) for budget, value in given.items() if value is not None]
    if len(asked) > 1:
        raise OptionError("pass one target: --reasoning-rate, --latency-ms or --quality")
    pairs = held_out_pairs(data)
    opened = OpenBundle.open(bundle, digest)
    if opened.manifest.gate is None:
        raise OptionError(f"{bundle} is a bundle of an embedding model that does not reason: it has no gate")
    embedder = Embedder.of_bundle(opened, backend=backend, device=device, threads=threads)
    with Console(stderr=True).status(f"calibrating on {len(pairs)} pairs"):
        gate = measure(embedder, pairs, data, asked[0] if asked else None)
    write_manifest(bundle, opened.manifest.model_copy(update={"gate": gate}))
    if as_json:
        print(gate.model_dump_json())
    else:
        console = Console(highlight=False)
        console.print(_curve(gate))
        console.print(f"digest {manifest_digest(bundle)}")
