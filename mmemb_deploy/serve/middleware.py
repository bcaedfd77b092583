"""What surrounds every request: an id, a line in the log, and the key that lets it in. Plain ASGI, for its speed."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmemb_deploy.serve.failures import Refusal, shortened
from mmemb_deploy.serve.logs import FIELDS

LOGGER = getLogger("mmemb_deploy.serve")
REQUEST_ID = re.compile(r"^[A-Za-z0-9_.:-]{1,128}$")
NOTED = "mmemb.noted"  # where a scope holds its Noted


@dataclass
class Noted:
    """What is known of a request, for the log and for errors."""

    request_id: str  # of X-Request-ID, or made
    client_request_id: str | None = None  # of the body; the answer's header has it before the other
    field: str = "input"  # that holds its inputs
    rows: int = 0
    tokens: int = 0
    error: str | None = None  # a Refusal's code


def noted(scope: Scope) -> Noted:
    """Return what is noted of a request."""
    found: Noted = scope[NOTED]
    return found


class RequestLog:
    """Gives every request an id, which the answer repeats, and logs one line when it is over."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is no HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        given = Headers(scope=scope).get("x-request-id", "")
        note = Noted(given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16))
        scope[NOTED] = note

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = note.client_request_id or note.request_id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            fields = {
                "request_id": note.request_id,
                "client_request_id": note.client_request_id,
                "method": scope["method"],
                "path": shortened(scope["path"], 100),
                "status": status,
                "seconds": round(time.perf_counter() - began, 6),
                "rows": note.rows,
                "tokens": note.tokens,
                "error": note.error,
            }
            asyncio.get_running_loop().call_soon(_log, fields)  # once the answer is out


def _log(fields: dict[str, Any]) -> None:
    """Write a line of the fields that are known."""
    LOGGER.info("request", extra={FIELDS: {name: value for name, value in fields.items() if value is not None}})


class Keys:
    """Lets requests in that show a key, as `Authorization: Bearer KEY`; with no keys, all of them."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[SecretStr],
        open_paths: Collection[str],
        refused: Callable[[Scope, Refusal], Response],
    ) -> None:
        self._app, self._open, self._refused = app, frozenset(open_paths), refused
        self._keys = [key.get_secret_value().encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 in place of the application where the key is missing or wrong."""
        if not self._keys or scope["type"] != "http" or scope["path"] in self._open or self._known(scope):
            await self._app(scope, receive, send)
            return
        message = "the key is missing or wrong: send the header Authorization: Bearer KEY"
        refusal = Refusal(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        await self._refused(scope, refusal)(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, shown = Headers(scope=scope).get("authorization", "").partition(" ")
        key = shown.strip().encode("latin-1")
        matches = [hmac.compare_digest(key, known) for known in self._keys]  # all of them, so that time tells nothing
        return scheme.lower() == "bearer" and any(matches)
