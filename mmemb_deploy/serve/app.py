"""The application: the contracts and what is beside them, as one ASGI app that any server can run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from logging import getLogger
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope

from mmemb_deploy.errors import DeadlineError, MmembError, OverloadError
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.serve.ask import Ask, Ended, Event
from mmemb_deploy.serve.body import read_body
from mmemb_deploy.serve.failures import CLIENT_GONE, ClientGoneError, Refusal, refusal_of, schema_refusal
from mmemb_deploy.serve.media import MediaLimits, MediaReader
from mmemb_deploy.serve.metrics import Metrics
from mmemb_deploy.serve.middleware import Keys, RequestLog, noted
from mmemb_deploy.serve.openapi import OPEN_PATHS, document
from mmemb_deploy.serve.page.gallery import Gallery
from mmemb_deploy.serve.page.routes import Trial, page_routes
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.settings import Settings
from mmemb_deploy.serve.tracing import Traces
from mmemb_deploy.serve.wire import cohere, openai, tei, voyage
from mmemb_deploy.serve.wire.common import Contract, Served, details_of

LOGGER = getLogger("mmemb_deploy.serve")
CONTRACTS = (openai.CONTRACT, cohere.CONTRACT, voyage.CONTRACT, tei.CONTRACT)
BY_PATH = {contract.path: contract for contract in CONTRACTS}
PAGE = "page"  # what metrics call the tries of the page
CONFIG = orjson.OPT_SERIALIZE_NUMPY

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    service: Service,
    settings: Settings,
    *,
    digest: str | None = None,
    gallery: Gallery | None = None,
    reader: MediaReader | None = None,
    traces: Traces | None = None,
    metrics: Metrics | None = None,
) -> ASGIApp:
    """Return the application around a service, which it starts and drains with its lifespan.

    `digest` is the bundle's, `gallery` what the page at `/` searches (None leaves the page out), `reader` reads images
    in place of the one that the settings describe, `traces` makes spans, and `metrics` counts, in place of its own.
    """
    preparer = service.preparer
    served = Served(
        preparer=preparer,
        names=settings.model_names or (preparer.manifest.model.name,),
        max_inputs=settings.max_inputs,
        max_waiting_rows=settings.max_waiting_rows,
        digest=digest,
    )
    metrics = metrics or Metrics(served.names[0], service.figures)
    return Front(service, settings, served, reader or _reader(settings), traces, metrics).app(gallery)


def _reader(settings: Settings) -> MediaReader:
    limits = MediaLimits(
        image_bytes=settings.max_media_bytes,
        total_bytes=settings.max_body_bytes,
        hosts=settings.media_hosts,
        seconds=settings.media_seconds,
    )
    return MediaReader(limits)


class Front:
    """What the routes share."""

    def __init__(
        self,
        service: Service,
        settings: Settings,
        served: Served,
        reader: MediaReader,
        traces: Traces | None,
        metrics: Metrics,
    ) -> None:
        self._service, self._settings, self._served = service, settings, served
        self._reader, self._traces, self._metrics = reader, traces, metrics
        self._description = _json(document(CONTRACTS, served, locked=bool(settings.api_keys)))
        self._models = _json(_models(served))
        self._info = _json(tei.info(served))

    def app(self, gallery: Gallery | None) -> ASGIApp:
        """Return the application, with the page where there is a gallery for it."""
        get: dict[str, Handler] = {
            "/v1/models": self._constant(self._models),
            "/info": self._constant(self._info),
            "/openapi.json": self._constant(self._description),
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics_page,
        }
        starlette = Starlette(
            routes=[
                *(Route(each.path, self._endpoint(each), methods=["POST"]) for each in CONTRACTS),
                *(Route(path, handler, methods=["GET"]) for path, handler in get.items()),
                *([] if gallery is None else page_routes(Tries(self._service, self._metrics), gallery, self._read)),
            ],
            exception_handlers=dict.fromkeys((Exception, Refusal, MmembError, HTTPException), self._failed)
            | {ClientGoneError: _gone},
            lifespan=self._lifespan,
        )
        starlette.router.redirect_slashes = False  # to the host that the client names
        open_paths = OPEN_PATHS | ({"/metrics"} if self._settings.open_metrics else set[str]())
        return RequestLog(Keys(starlette, self._settings.api_keys, open_paths, self._refused))

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        await self._service.start()
        yield
        await self._service.drain(self._settings.drain_seconds)
        await self._reader.aclose()

    def _endpoint(self, contract: Contract) -> Handler:
        async def endpoint(request: Request) -> Response:
            began = time.perf_counter()
            with nullcontext() if self._traces is None else self._traces.request(request.headers) as span:
                body = await self._read(request)
                try:
                    asked = contract.request.model_validate_json(body)
                except ValidationError as error:
                    raise schema_refusal(error, contract.request) from error
                note = noted(request.scope)
                note.field = contract.field(asked)
                ask = contract.ask(asked, self._served)
                note.client_request_id = getattr(asked, "request_id", None)
                note.rows = len(ask.inputs)
                result = await unless_gone(self._embedded(ask, began), request.receive)
                details = details_of(result)
                note.tokens = sum(detail.prompt_tokens + detail.rationale_tokens for detail in details)
                answer = _json(contract.answer(asked, result, self._served))
                seconds = time.perf_counter() - began
                loop = asyncio.get_running_loop()
                loop.call_soon(self._metrics.answered, contract.name, details, seconds)  # once the answer is out
                if self._traces is not None and span is not None:
                    self._traces.answered(span, details, ask.options.get("truncate_dim"))
                return Response(answer, media_type="application/json", headers=contract.headers(result, seconds))

        return endpoint

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, self._settings.max_body_bytes, self._settings.body_seconds)

    async def _embedded(self, ask: Ask, began: float) -> EncodeResult:
        """Read the images of a request and embed it, all within its deadline."""
        if ask.deadline is None:
            inputs = await self._reader.read(ask.inputs)
            return await self._service.embed(ask if inputs is ask.inputs else replace(ask, inputs=inputs))
        late = DeadlineError(f"the deadline of {1e3 * ask.deadline:g} ms passed before it was read")
        try:
            async with asyncio.timeout(ask.deadline):
                inputs = await self._reader.read(ask.inputs)
        except TimeoutError as error:
            raise late from error
        left = ask.deadline - (time.perf_counter() - began)
        if left <= 0:
            raise late
        return await self._service.embed(replace(ask, inputs=inputs, deadline=left))

    async def _failed(self, request: Request, error: Exception) -> Response:
        contract = _contract(request.scope)
        if isinstance(error, OverloadError):
            self._metrics.rejected(_counted_as(request.scope), error.reason)
        return self._refused(request.scope, refusal_of(error, noted(request.scope).field, contract.request))

    def _refused(self, scope: Scope, refusal: Refusal) -> Response:
        """Answer with a refusal in the envelope of the contract that was asked."""
        contract = _contract(scope)
        noted(scope).error = refusal.code
        self._metrics.failed(_counted_as(scope), refusal.code)
        status = contract.status.get(refusal.status, refusal.status)
        return Response(_json(contract.refuse(refusal)), status, refusal.headers, "application/json")

    @staticmethod
    def _constant(content: bytes) -> Handler:
        async def constant(_: Request) -> Response:
            return Response(content, media_type="application/json")

        return constant

    async def _health(self, _: Request) -> Response:
        if not self._service.alive:
            raise Refusal(503, "engine_stopped", "the engine has stopped by a defect: start the server again")
        return Response(_json({"status": "ok"}), media_type="application/json")

    async def _ready(self, _: Request) -> Response:
        if not self._service.ready:
            raise Refusal(503, "not_ready", "the server is starting or stopping", headers={"Retry-After": "1"})
        return Response(_json({"status": "ok"}), media_type="application/json")

    async def _metrics_page(self, _: Request) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


class Tries:
    """The service as the page asks it: its tries are counted as its own."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics
        self.preparer = service.preparer

    async def watch(self, ask: Ask) -> AsyncGenerator[Event]:
        """Do as `Service.watch`."""
        try:
            async with aclosing(self._service.watch(ask)) as events:
                async for event in events:
                    if isinstance(event, Ended):
                        self._metrics.answered(PAGE, [event.detail], event.seconds)
                    yield event
        except MmembError as error:
            if isinstance(error, OverloadError):
                self._metrics.rejected(PAGE, error.reason)
            self._metrics.failed(PAGE, refusal_of(error, "input", Trial).code)
            raise


async def unless_gone(work: Awaitable[EncodeResult], receive: Receive) -> EncodeResult:
    """Await work for a client; where the client closes its connection, cancel it and raise ClientGoneError."""
    task = asyncio.current_task()
    assert task is not None, "ASGI applications run in tasks"

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError as error:
        if watcher.done() and not watcher.cancelled():
            task.uncancel()
            raise ClientGoneError from error
        raise
    finally:
        watcher.cancel()


async def _gone(request: Request, _: Exception) -> Response:
    noted(request.scope).error = "client_gone"
    return Response(status_code=CLIENT_GONE)


def _contract(scope: Scope) -> Contract:
    """Return the contract that a path belongs to; OpenAI's for all that no other has."""
    return BY_PATH.get(scope["path"], openai.CONTRACT)


def _counted_as(scope: Scope) -> str:
    """Return the contract by which metrics know a request."""
    path = scope["path"]
    if path in BY_PATH:
        return BY_PATH[path].name
    return PAGE if path.startswith("/page/") else "none"


def _models(served: Served) -> dict[str, Any]:
    facts = {"object": "model", "created": 0, "owned_by": "mmemb-deploy", "max_model_len": served.max_input_tokens}
    return {"object": "list", "data": [{"id": name, **facts} for name in served.names]}


def _json(content: Any) -> bytes:
    return orjson.dumps(content, option=CONFIG)
