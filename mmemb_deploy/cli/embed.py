"""The command `mmemb embed`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_deploy.cli.options import Backend, Bundle, Device, Digest, Former, Json, Threads, same_bundle
from mmemb_deploy.errors import OptionError, check_known

if TYPE_CHECKING:
    from mmemb_deploy.reasoners.remote import RemoteReasoner


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(embed)


def embed(
    source: Annotated[Path, typer.Argument(help="A folder of files, or JSON lines, CSV or parquet of inputs.")],
    output: Annotated[Path, typer.Argument(help="File to write, .npz or .parquet.")],
    bundle: Bundle = None,
    reasoning: Annotated[str, typer.Option(help="auto, never or always.")] = "auto",
    threshold: Annotated[float | None, typer.Option(help="Gate score from which auto reasons.")] = None,
    reasoning_rate: Annotated[float | None, typer.Option(help="Share of every 256 inputs that reasons.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What to embed for; the bundle's by default.")] = None,
    document: Annotated[bool, typer.Option("--document", help="Embed as documents, on the fast path.")] = False,
    whole_documents: Annotated[
        bool, typer.Option("--whole-documents", help="A row for each PDF, not for each of its pages.")
    ] = False,
    clip_seconds: Annotated[
        float | None, typer.Option(help="A row for so many seconds of each video; one for the whole by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs that run together.")] = 32,
    truncate_dim: Annotated[int | None, typer.Option(help="Leading values to keep.")] = None,
    precision: Annotated[str, typer.Option(help="float32, int8 or ubinary.")] = "float32",
    errors: Annotated[str, typer.Option(help="raise: stop at a bad input; return: mark it and go on.")] = "raise",
    backend: Backend = "auto",
    device: Device = 0,
    threads: Threads = None,
    digest: Digest = None,
    reasoner: Annotated[str | None, typer.Option(help="Address of a server that writes the rationales.")] = None,
    reasoner_model: Annotated[str | None, typer.Option(help="The name under which it serves the model.")] = None,
    reasoner_key: Annotated[str | None, typer.Option(help="Environment variable that holds its key.")] = None,
    reasoner_timeout: Annotated[float, typer.Option(help="Seconds to wait for a rationale, retries included.")] = 30.0,
    on_failure: Annotated[str, typer.Option(help="Without a rationale: raise, or direct: do without it.")] = "raise",
    prepare_threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that decode and resize; one for each core, at most 8, by default."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Embed on the Ray cluster at RAY_ADDRESS, or on one here.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Devices that --ray takes; all it can by default.")] = None,
    as_json: Json = False,
    former: Former = None,
) -> None:
    """Embed a file or a folder of inputs. Interrupted, the same command goes on where it stopped."""
    from mmemb_deploy.bundle import folder
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.jobs.job import Job, Summary, check_output
    from mmemb_deploy.jobs.ray import embed_on_ray
    from mmemb_deploy.jobs.readers import reader_of
    from mmemb_deploy.jobs.records import Division
    from mmemb_deploy.jobs.run import embed_source
    from mmemb_deploy.jobs.source import read_source
    from mmemb_deploy.options import EncodeOptions
    from mmemb_deploy.progress import counting

    check_output(output)
    check_known("errors", errors, ("raise", "return"))
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
    remote = _reasoner(reasoner, reasoner_model, reasoner_key, reasoner_timeout, on_failure)
    bundle = same_bundle(bundle, former)
    if not ray and workers is not None:
        raise OptionError(f"workers is {workers}: they are what --ray takes; pass it too")
    if ray and device != 0:
        raise OptionError(f"device is {device}: with --ray, each worker takes whichever is free; leave it out")
    if ray and prepare_threads is not None:
        raise OptionError(f"prepare_threads is {prepare_threads}: with --ray, each worker has one; leave it out")
    reader_of(source)  # there is one
    division = Division(whole_documents, clip_seconds)
    opened = folder.Bundle.open(folder.NANO if bundle is None else bundle, digest)
    keep_going = errors == "return"
    with counting(None, shown=not as_json, label="reading") as seen:
        inputs = read_source(source, division=division, limits=opened.manifest.limits, keep_going=keep_going, seen=seen)
    job = Job(inputs, output.absolute(), options, document=document, keep_going=keep_going)
    run: Callable[[Job, Callable[[int], None]], Summary]
    if ray:
        run = partial(
            embed_on_ray,
            bundle=None if bundle is None else opened,
            backend=backend,
            threads=threads,
            reasoner=remote,
            digest=digest,
            workers=workers,
        )
    else:
        embedder = Embedder.of_bundle(opened, backend=backend, device=device, threads=threads, reasoner=remote)
        print(embedder.notes[0], file=sys.stderr)
        run = partial(embed_source, embedder, prepare_threads=prepare_threads)
    began = time.perf_counter()
    try:
        with counting(inputs.rows, shown=not as_json) as done:
            summary = run(job, done)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    seconds = time.perf_counter() - began
    if as_json:
        figures = {
            "output": str(output),
            "rows": summary.rows,
            "failures": summary.failures,
            "reasoning_rate": summary.reasoned / summary.rows,
            "rationale_tokens": summary.rationale_tokens,
            "fallbacks": summary.fallbacks,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(figures))
    else:
        print(
            f"{output}: {summary.rows} rows, {summary.failures} failed, {summary.reasoned} reasoned with "
            f"{summary.rationale_tokens} tokens, {summary.fallbacks} fell back to the direct embedding, "
            f"{summary.rows / seconds:.1f} rows/s"
        )


def _reasoner(
    url: str | None, model: str | None, key: str | None, timeout: float, on_failure: str
) -> RemoteReasoner | None:
    if (url is None) != (model is None):
        raise OptionError("pass --reasoner, the server's address, and --reasoner-model, what it serves, or neither")
    if url is None or model is None:
        return None
    from mmemb_deploy.reasoners.remote import RemoteReasoner

    return RemoteReasoner(url, model=model, api_key_variable=key, timeout=timeout, on_failure=on_failure)
