"""The page's routes: the page itself, what it searches, and a try whose events are told as they happen."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from mmemb_deploy.errors import InputError, MmembError
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.preparer import Preparer
from mmemb_deploy.routing import router
from mmemb_deploy.serve.ask import Ask, Ended, Event, Scored, Wrote
from mmemb_deploy.serve.failures import Refusal
from mmemb_deploy.serve.page.gallery import Gallery

PAGE = Path(__file__).with_name("index.html")
NEAREST = 6  # documents that a try shows

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


def _decoded(uri: object) -> bytes:
    prefix = _DATA_URI.match(uri) if isinstance(uri, str) else None
    if prefix is None:
        raise ValueError("it is no data URI of a picture; pass 'data:image/png;base64,...'")
    try:
        return base64.b64decode(str(uri)[prefix.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"it is no base64 ({error}); encode the picture again") from error


class Trial(BaseModel):
    """The body of a try: a text, pictures as data URIs, or both, and what to embed them for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str = ""
    images: list[Annotated[bytes, BeforeValidator(_decoded)]] = []
    instruction: str | None = None  # None takes the bundle's

    def ask(self, *, reasons: bool) -> Ask:
        """Return what to watch. It always reasons, so that one run shows both ways: the direct one is on it."""
        content: dict[str, Any] = {"images": self.images} if self.images else {}
        if self.text or not self.images:
            content["text"] = self.text
        options: EncodeOptions = {"instruction": self.instruction, "reasoning": "always" if reasons else "never"}
        return Ask(inputs=[content], options=options)


class Watched(Protocol):
    """What the page needs of the engine that serves it."""

    @property
    def preparer(self) -> Preparer:
        """Return the preparer, for what it says of its bundle."""
        ...

    def watch(self, ask: Ask) -> AsyncGenerator[Event]:
        """Embed one input and yield one Scored, any number of Wrote, one Ended; closing it gives the work up.

        Raises MmembError, before the first of them or between.
        """
        ...


def page_routes(
    service: Watched, gallery: Gallery, read: Callable[[Request], Awaitable[bytes]] = Request.body
) -> list[BaseRoute]:
    """Return the routes of `/`, `/page/gallery` and `/page/try`, whose body is what `read` returns.

    A try raises Refusal where its body is none; what goes wrong after that is its last event. Its events are those of
    the server: "gate", any number of "token", then "done" or "error", each with a JSON object.
    """
    html = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(html),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    facts = _facts(service, gallery)

    async def page(_: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def show_gallery(_: Request) -> Response:
        return JSONResponse(facts)

    async def try_it(request: Request) -> Response:
        try:
            trial = Trial.model_validate_json(await read(request))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            param = ".".join(map(str, first["loc"]))
            message = f"{param or 'the body'}: {first['msg']}"
            raise Refusal(400, "invalid_request", message, param or None) from error
        events = service.watch(trial.ask(reasons=service.preparer.reasons))
        streaming = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_told(events, gallery), media_type="text/event-stream", headers=streaming)

    return [
        Route("/", page, name="page"),
        Route("/page/gallery", show_gallery, name="page-gallery"),
        Route("/page/try", try_it, methods=["POST"], name="page-try"),
    ]


async def _told(events: AsyncGenerator[Event], gallery: Gallery) -> AsyncGenerator[str]:
    """Yield server-sent events; an error of this package ends them as one, so that the page can show it."""
    scored: Scored | None = None
    try:
        async with aclosing(events):  # a client that leaves ends the work
            async for event in events:
                match event:
                    case Scored():
                        scored = event
                        yield _sent("gate", _gate(event, gallery))
                    case Wrote():
                        yield _sent("token", {"text": event.text})
                    case Ended():
                        yield _sent("done", _done(event, scored, gallery))
    except InputError as error:
        yield _sent("error", {"message": error.message})  # a try has one input: which one it was says nothing
    except MmembError as error:
        yield _sent("error", {"message": str(error)})


def _gate(scored: Scored, gallery: Gallery) -> dict[str, Any]:
    return {
        "score": None if math.isnan(scored.score) else scored.score,
        "threshold": scored.threshold,
        "route": _auto(scored),
        "nearest": _nearest(scored.embedding, gallery),
        "ms": 1e3 * scored.seconds,
    }


def _done(ended: Ended, scored: Scored | None, gallery: Gallery) -> dict[str, Any]:
    """Return the end of a try, and its costs: the engine's own time, without waiting.

    "never" stops after the fast path of this very run and "always" goes on from it; "auto" is one of the two. Where
    nothing was written, for want of a reasoning path or of room, there is no "always".
    """
    detail, timings = ended.detail, ended.detail.timings
    never = {"ms": 1e3 * (timings.preprocess + timings.fast_path), "tokens": 0}
    always = {"ms": 1e3 * timings.total, "tokens": detail.rationale_tokens}
    reasoned = detail.route is router.Route.REASON
    return {
        "route": detail.route,
        "nearest": _nearest(ended.embedding, gallery),
        "truncated": detail.truncated,
        "degraded_by": detail.degraded_by,
        "fallback": detail.fallback,
        "prompt_tokens": detail.prompt_tokens,
        "costs": {"never": never, "always": always if reasoned else None},
        "auto": "always" if reasoned and scored is not None and _auto(scored) is router.Route.REASON else "never",
        "ms": 1e3 * ended.seconds,
    }


def _auto(scored: Scored) -> router.Route:
    """Return the route that the gate chooses."""
    reasons = scored.threshold is not None and scored.score >= scored.threshold
    return router.Route.REASON if reasons else router.Route.FAST


def _nearest(embedding_D: Floats, gallery: Gallery) -> list[dict[str, float]]:
    return [{"document": index, "cosine": cosine} for index, cosine in gallery.nearest(embedding_D, NEAREST)]


def _facts(service: Watched, gallery: Gallery) -> dict[str, Any]:
    preparer = service.preparer
    manifest, gate = preparer.manifest, preparer.manifest.gate
    points = () if gate is None else gate.curve
    kept = {"threshold", "reasoning_rate", "quality", "rationale_tokens"}
    return {
        "model": manifest.model.name,
        "backend": preparer.backend,
        "dim": preparer.dim,
        "instruction": manifest.prompt.query_instruction,
        "threshold": None if gate is None else gate.threshold,
        "curve": [point.model_dump(include=kept) for point in points],
        "documents": [asdict(document) for document in gallery.documents],
        "samples": [asdict(sample) for sample in gallery.samples],
        "note": gallery.note,
        "ink": gallery.ink,
    }


def _sent(event: str, data: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data, allow_nan=False)}\n\n"


def _policy(html: str) -> str:
    """Return the Content-Security-Policy that lets the page run its own script and style, and reach its own server."""
    allowed = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
            for block in re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
