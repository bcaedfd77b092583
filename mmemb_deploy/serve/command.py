"""The command `mmemb serve`."""

from __future__ import annotations

from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Annotated

import typer

from mmemb_deploy.cli.options import Backend, Bundle, Device, Digest, Threads
from mmemb_deploy.errors import MissingExtraError, OptionError

LOGGER = getLogger("mmemb_deploy.serve")
LOCAL = ("127.0.0.1", "::1", "localhost")
PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "orjson", "httpx", "prometheus_client")  # of the extra


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    bundle: Bundle = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name of the model; repeat it for more.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="File of keys, one a line; or MMEMB_API_KEYS.")] = None,
    open_metrics: Annotated[bool, typer.Option("--open-metrics", help="Answer /metrics without a key.")] = False,
    allow_media_host: Annotated[list[str] | None, typer.Option(help="Host to fetch images from; repeatable.")] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of a request's body.")] = 32 * 2**20,
    max_media_bytes: Annotated[int, typer.Option(help="Bytes of one encoded image.")] = 20 * 2**20,
    max_inputs: Annotated[int, typer.Option(help="Inputs of one request.")] = 2048,
    max_waiting_rows: Annotated[int, typer.Option(help="Inputs accepted and not yet answered.")] = 4096,
    max_wait_seconds: Annotated[float, typer.Option(help="Seconds of prompts that may wait before a request.")] = 30.0,
    timeout_headers: Annotated[float, typer.Option(help="Seconds for a client to send its headers.")] = 10.0,
    timeout_body: Annotated[float, typer.Option(help="Seconds for a client to send its body.")] = 30.0,
    timeout_keep_alive: Annotated[int, typer.Option(help="Seconds that an idle connection stays open.")] = 75,
    drain_seconds: Annotated[float, typer.Option(help="Seconds to answer what was accepted, when stopped.")] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    gallery: Annotated[Path | None, typer.Option(help="Folder of pictures for the page at / to search.")] = None,
    page: Annotated[bool, typer.Option(help="Show a page at / to try the model by hand.")] = True,
    otel: Annotated[bool, typer.Option("--otel", help="Send a span for each request by OTLP.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve on the Ray cluster at RAY_ADDRESS, or on one here: a replica a device.")
    ] = False,
    backend: Backend = "auto",
    device: Device = 0,
    threads: Threads = None,
    digest: Digest = None,
) -> None:
    """Serve a bundle by HTTP: OpenAI's /v1/embeddings, Cohere's /v2/embed, TEI's /embed, Voyage's images, and a page.

    TLS is left to a proxy in front. SIGTERM answers what was accepted, then ends.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingExtraError(package, "serve")
    from mmemb_deploy.bundle.folder import NANO
    from mmemb_deploy.bundle.folder import Bundle as OpenBundle
    from mmemb_deploy.bundle.manifest import manifest_digest
    from mmemb_deploy.serve.logs import log_json
    from mmemb_deploy.serve.process import EngineProcess
    from mmemb_deploy.serve.settings import read_keys, settings_of
    from mmemb_deploy.serve.worker import Limits

    settings = settings_of(
        host=host,
        port=port,
        model_names=tuple(served_model_name or ()),
        api_keys=tuple(read_keys(api_keys)),
        open_metrics=open_metrics,
        media_hosts=frozenset(each.lower() for each in allow_media_host or ()),
        max_body_bytes=max_body_bytes,
        max_media_bytes=max_media_bytes,
        max_inputs=max_inputs,
        max_waiting_rows=max_waiting_rows,
        max_wait_seconds=max_wait_seconds,
        header_seconds=timeout_headers,
        body_seconds=timeout_body,
        keep_alive_seconds=timeout_keep_alive,
        drain_seconds=drain_seconds,
        log_level=log_level,
        otel=otel,
    )
    if ray:
        if device != 0:
            raise OptionError(f"device is {device}: with --ray, each replica takes whichever is free; leave it out")
        if find_spec("ray") is None:
            raise MissingExtraError("ray", "ray")
        from mmemb_deploy.serve.ray import Arguments, run_on_ray

        run_on_ray(
            Arguments(
                bundle=bundle,
                backend=backend,
                threads=threads,
                digest=digest,
                page=page,
                gallery=gallery,
                settings=settings,
            )
        )
        return
    opened = OpenBundle.open(bundle or NANO, digest)
    log_json(settings.log_level)
    if not settings.api_keys and settings.host not in LOCAL:
        LOGGER.warning("whoever reaches %s is let in, as there are no keys: pass --api-keys", settings.host)
    limits = Limits(max_wait=settings.max_wait_seconds)
    engine = EngineProcess(
        opened, backend=backend, device=device, threads=threads, limits=limits, log_level=settings.log_level
    )
    from mmemb_deploy.preparer import Preparer, row_encoder  # while the engine loads
    from mmemb_deploy.serve.app import create_app
    from mmemb_deploy.serve.page.gallery import open_gallery
    from mmemb_deploy.serve.server import run
    from mmemb_deploy.serve.service import Service
    from mmemb_deploy.serve.tracing import Traces

    preparer = Preparer(opened.manifest, row_encoder(opened), backend=engine.loaded())
    searched = open_gallery(preparer, engine.encode_document, gallery) if page else None
    service = Service(preparer, engine, max_waiting_rows=settings.max_waiting_rows)
    name = (settings.model_names or (preparer.manifest.model.name,))[0]
    traces = Traces(name, preparer.dim) if settings.otel else None
    app = create_app(service, settings, digest=manifest_digest(opened.folder), gallery=searched, traces=traces)
    run(app, service, settings)
