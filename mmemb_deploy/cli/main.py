"""The command line, `mmemb`. Other packages add commands through the entry point group "mmemb.commands"."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mmemb_deploy
from mmemb_deploy.errors import MmembError, OptionError

if TYPE_CHECKING:
    from mmemb_deploy.bundle.manifest import GateFacts

COMMANDS = "mmemb.commands"  # each entry is `register(app: typer.Typer) -> None`

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Embed text, images, video and documents, reasoning only where it helps.",
)

Bundle = Annotated[Path | None, typer.Argument(help="Bundle folder; the embedded nano bundle by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, for scripts.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `mmemb` on the command line's arguments, or on these.

    Exit code 2 for a user's mistake, 130 when interrupted, 1 for a defect.
    """
    for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        entry.load()(app)
    try:
        app(arguments)
    except MmembError as error:
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True, highlight=False).print("[bold red]error:[/]", escape(str(error)), soft_wrap=True)
        if "--json" in (sys.argv if arguments is None else arguments):
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        raise SystemExit(2) from error


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Embed text, images, video and documents, reasoning only where it helps."""
    if show:
        print(mmemb_deploy.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def embed(
    source: Annotated[Path, typer.Argument(help="JSON lines (strings, or objects of an input's parts), or a folder.")],
    output: Annotated[Path, typer.Argument(help="File to write, .npz or .parquet.")],
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder; the embedded nano bundle by default.")] = None,
    reasoning: Annotated[str, typer.Option(help="auto, never or always.")] = "auto",
    threshold: Annotated[float | None, typer.Option(help="Gate score from which auto reasons.")] = None,
    reasoning_rate: Annotated[float | None, typer.Option(help="Share of every 256 inputs that reasons.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What to embed for; the bundle's by default.")] = None,
    document: Annotated[bool, typer.Option("--document", help="Embed as documents, on the fast path.")] = False,
    batch_size: Annotated[int, typer.Option(help="Inputs that run together.")] = 32,
    truncate_dim: Annotated[int | None, typer.Option(help="Leading values to keep.")] = None,
    precision: Annotated[str, typer.Option(help="float32, int8 or ubinary.")] = "float32",
    errors: Annotated[str, typer.Option(help="raise: stop at a bad input; return: mark it and go on.")] = "raise",
    threads: Annotated[int | None, typer.Option(help="Threads of one operator; all cores by default.")] = None,
    reasoner: Annotated[str | None, typer.Option(help="Address of a server that writes the rationales.")] = None,
    reasoner_model: Annotated[str | None, typer.Option(help="The name under which it serves the checkpoint.")] = None,
    reasoner_key: Annotated[str | None, typer.Option(help="Environment variable that holds its key.")] = None,
    reasoner_timeout: Annotated[float, typer.Option(help="Seconds to wait for a rationale, retries included.")] = 30.0,
    on_failure: Annotated[str, typer.Option(help="Without a rationale: raise, or direct: do without it.")] = "raise",
    as_json: Json = False,
) -> None:
    """Embed a file or folder of inputs. Interrupted, the same command goes on where it stopped."""
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.errors import check_known
    from mmemb_deploy.jobs.files import check_output, embed_source, read_source
    from mmemb_deploy.options import EncodeOptions
    from mmemb_deploy.progress import counting

    check_known("errors", errors, ("raise", "return"))
    check_output(output)
    options: EncodeOptions = {
        "threshold": threshold,
        "reasoning_rate": reasoning_rate,
        "batch_size": batch_size,
        "truncate_dim": truncate_dim,
        "precision": precision,
    }
    if instruction is not None:
        options["instruction"] = instruction
    if not document or reasoning != "auto":
        options["reasoning"] = reasoning
    if (reasoner is None) != (reasoner_model is None):
        raise OptionError("pass --reasoner, the server's address, and --reasoner-model, what it serves, or neither")
    remote = None
    if reasoner is not None and reasoner_model is not None:
        from mmemb_deploy.reasoners.remote import RemoteReasoner

        remote = RemoteReasoner(
            reasoner,
            model=reasoner_model,
            api_key_variable=reasoner_key,
            timeout=reasoner_timeout,
            on_failure=on_failure,
        )
    inputs = read_source(source)
    embedder = Embedder.load(bundle, threads=threads, reasoner=remote)
    began = time.perf_counter()
    try:
        with counting(len(inputs.ids), shown=not as_json) as done:
            summary = embed_source(
                embedder, inputs, output, options, document=document, keep_going=errors == "return", done=done
            )
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    seconds = time.perf_counter() - began
    figures = {
        "output": str(output),
        "rows": summary.rows,
        "failures": summary.failures,
        "reasoning_rate": summary.reasoned / summary.rows,
        "rationale_tokens": summary.rationale_tokens,
        "fallbacks": summary.fallbacks,
        "seconds": round(seconds, 3),
    }
    if as_json:
        print(json.dumps(figures))
    else:
        print(
            f"{output}: {summary.rows} rows, {summary.failures} failed, {summary.reasoned} reasoned with "
            f"{summary.rationale_tokens} tokens, {summary.fallbacks} fell back to the direct embedding, "
            f"{summary.rows / seconds:.1f} rows/s"
        )


@app.command()
def inspect(bundle: Bundle = None, as_json: Json = False) -> None:
    """Show what a bundle is: model, graphs, gate, certificate."""
    from rich.console import Console

    from mmemb_deploy.bundle.folder import NANO
    from mmemb_deploy.bundle.manifest import read_manifest

    folder = bundle or NANO
    manifest = read_manifest(folder)
    if as_json:
        print(manifest.model_dump_json())
        return
    console = Console(highlight=False)
    console.print(f"[bold]{folder}[/], schema {manifest.schema_version}, written by mmemb-deploy {manifest.written_by}")
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


def _print_certificate(console: Any, certificate: Any) -> None:
    from rich.table import Table

    table = Table(title=f"certificate: {certificate.runtime} against {certificate.reference}")
    for column in ("embeddings", "inputs", "min cosine", "mean cosine", "gate flips"):
        table.add_column(column, justify="left" if column == "embeddings" else "right")
    for name, parity in certificate.parities.items():
        flips = "-" if name == "reasoned" else str(parity.gate_flips)
        table.add_row(name, str(parity.inputs), f"{parity.min_cosine:.8f}", f"{parity.mean_cosine:.8f}", flips)
    console.print(table)
    console.print(
        f"rationale token agreement {certificate.token_agreement:.3%}, nearest neighbour agreement "
        f"{certificate.retrieval_overlap:.3%}, bounds {certificate.bounds.model_dump()}"
    )


@app.command()
def verify(bundle: Bundle = None, as_json: Json = False) -> None:
    """Check a bundle's hashes and certificate, load it, and embed a text and an image by every route it has."""
    import numpy as np

    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.errors import CertificateError

    embedder = Embedder.load(bundle)
    image = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3)
    inputs = ["a text", {"image": image, "text": "and an image"}]
    for reasoning in ("never", "always") if embedder.reasons else ("never",):
        lengths = np.linalg.norm(embedder.encode(inputs, reasoning=reasoning), axis=1)
        if not np.allclose(lengths, 1, atol=1e-5):
            raise CertificateError(f"embeddings with reasoning={reasoning!r} have lengths {lengths}, not 1")
    if as_json:
        print(json.dumps({"verified": True, "backend": embedder.backend}))
    else:
        print(f"verified: {len(embedder.manifest.files)} files, the certificate, and a run on {embedder.backend}")


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, whose manifest is rewritten.")],
    data: Annotated[str, typer.Option(help="'digitchain', or JSON lines of query, candidates, relevant.")],
    reasoning_rate: Annotated[float | None, typer.Option(help="Reason on at most this share.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Expect at most this latency per input.")] = None,
    quality: Annotated[float | None, typer.Option(help="Reach at least this hit@1, reasoning least.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one operator; all cores by default.")] = None,
    as_json: Json = False,
) -> None:
    """Choose a bundle's gate threshold anew, on pairs of your own that it was not trained on.

    Without a target, the threshold is the largest that keeps quality within half a point of the best, and every group
    of pairs whole.
    """
    from rich.console import Console

    from mmemb_deploy.bundle.folder import Bundle
    from mmemb_deploy.bundle.manifest import write_manifest
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.evaluation.calibration import Budget, Target
    from mmemb_deploy.evaluation.calibration import calibrate as measure
    from mmemb_deploy.evaluation.pairs import held_out_pairs

    given: dict[Budget, float | None] = {"reasoning_rate": reasoning_rate, "latency_ms": latency_ms, "quality": quality}
    asked = [Target(budget, value) for budget, value in given.items() if value is not None]
    if len(asked) > 1:
        raise OptionError("pass one target: --reasoning-rate, --latency-ms or --quality")
    pairs = held_out_pairs(data)
    opened = Bundle.open(bundle)
    if opened.manifest.gate is None:
        raise OptionError(f"{bundle} is a bundle of an embedding model that does not reason: it has no gate")
    embedder = Embedder.of_bundle(opened, threads=threads)
    with Console(stderr=True).status(f"calibrating on {len(pairs)} pairs"):
        gate = measure(embedder, pairs, data, asked[0] if asked else None)
    write_manifest(bundle, opened.manifest.model_copy(update={"gate": gate}))
    if as_json:
        print(gate.model_dump_json())
    else:
        Console(highlight=False).print(_curve(gate))
