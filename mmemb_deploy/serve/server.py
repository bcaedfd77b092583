"""uvicorn as this server runs it: slow headers time out, and a signal drains before anything closes."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.settings import Settings

HEAD_BYTES = 2**16  # of a request's headers, beyond which they are not awaited
FLUSH_SECONDS = 2  # for clients to take the last answers, after the drain


def patient(seconds: float) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol, which ends connections whose headers take longer than this, or too much."""

    class PatientProtocol(HttpToolsProtocol):
        """Waits for headers from a connection's first moment, and again from each request's first byte."""

        _waiting: asyncio.TimerHandle | None = None
        _head = 0  # bytes that arrived while headers were awaited

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._head = self._head + len(data) if self._waiting is not None else 0
            if self._head > HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The headers are too large.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._arrived()
            self._wait()

        def on_headers_complete(self) -> None:
            self._arrived()
            super().on_headers_complete()

        def _wait(self) -> None:
            self._waiting = self.loop.call_later(seconds, self.transport.close)

        def _arrived(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return PatientProtocol


class DrainingServer(uvicorn.Server):
    """Answers what was accepted before it closes its port; meanwhile /ready is 503, and so is what is new."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float) -> None:
        super().__init__(config)
        self._service, self._seconds = service, seconds

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end, as where the engine has: whatever started the server can start it again."""
        return await super().on_tick(counter) or not self._service.alive

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, or stop draining where a second Ctrl-C asks for it."""
        draining = asyncio.create_task(self._service.drain(self._seconds))
        while not (draining.done() or self.force_exit):
            await asyncio.wait([draining], timeout=0.1)
        await super().shutdown(sockets)


def server_of(app: ASGIApp, service: Service, settings: Settings, **options: Any) -> DrainingServer:
    """Return a server that is yet to run; `options` are uvicorn's."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=patient(settings.header_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=FLUSH_SECONDS,
        **options,
    )
    return DrainingServer(config, service, settings.drain_seconds)


def run(app: ASGIApp, service: Service, settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and return.

    Raises SystemExit where it could not start, and with 1 where the engine has ended.
    """
    server = server_of(app, service, settings)
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended: they are dealt with
        signal.signal(stop, lambda *_: None)
    server.run()
    if not (server.started and service.alive):
        raise SystemExit(1)
