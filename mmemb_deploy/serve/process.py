"""A worker in a process of its own, so that clients' JSON and images do not stop the engine between two runs.

Both processes are this package's, of one user, and what they send each other over their own pair of sockets is pickled.
"""

from __future__ import annotations

import asyncio
import gc
import io
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.child import calling
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import BackendError, MmembError
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.serve.logs import log_json
from mmemb_deploy.serve.messages import Message, Report
from mmemb_deploy.serve.worker import Limits, Worker, run

LOGGER = getLogger("mmemb_deploy.serve")
SIZE = 8  # bytes of a message's own size, before it
CHUNK = 2**18  # bytes that are received at once
ENDING = 10.0  # seconds for a process to end once it has been told to


@dataclass(frozen=True)
class Setup:
    """What a process is started with."""

    bundle: Bundle
    backend: str
    device: int
    threads: int | None
    limits: Limits
    log_level: str


@dataclass(frozen=True)
class Documents:
    """Inputs to embed as documents before the service begins."""

    inputs: Sequence[Any]


class Begin:
    """The service begins: what comes now is for its worker."""


class EngineProcess:
    """The process that uses the engine; see `mmemb_deploy.serve.messages.Runner`.

    It starts at once. Until `start`, ask `loaded` and `encode_document`, which wait for it.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = "auto",
        device: int = 0,
        threads: int | None = None,
        limits: Limits | None = None,
        log_level: str = "info",
    ) -> None:
        """Load a bundle there, as `Embedder.of_bundle` does."""
        self._socket, there = socket.socketpair()
        with there:
            command = [sys.executable, "-P", "-c", calling(__name__, there.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[there.fileno()])
        self._channel = Channel(self._socket)
        self._channel.send(Setup(bundle, backend, device, threads, limits or Limits(), log_level))
        self._stopping = False

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def loaded(self) -> str:
        """Return the name of the backend that was chosen, once it is loaded. Raises as `Embedder.of_bundle`."""
        try:
            name: str = self._answer()
        except MmembError:
            self._socket.close()
            self._process.wait()
            raise
        return name

    def encode_document(self, inputs: Sequence[Any]) -> Floats:
        """Return what `Embedder.encode_document` does."""
        self._channel.send(Documents(inputs))
        embeddings: Floats = self._answer()
        return embeddings

    async def start(self, heard: Callable[[Report], None]) -> None:
        """Begin."""
        self._channel.send(Begin())
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[None] = loop.create_future()
        self._transport, _ = await loop.create_connection(lambda: Reports(heard, lost), sock=self._socket)
        self._watching = asyncio.create_task(self._watch(heard, lost))

    def send(self, message: Message | None) -> None:
        """Send it, and do not wait."""
        if not self._transport.is_closing():
            self._transport.write(packed(message))

    async def stop(self) -> None:
        """End after the run at hand; kill what does not."""
        self._stopping = True
        self.send(None)
        _, late = await asyncio.wait([self._watching], timeout=ENDING)
        if late:
            self._process.kill()
            await self._watching

    def _answer(self) -> Any:
        try:
            answer = self._channel.receive_one()
        except EOFError as error:
            raise BackendError(f"{self._death(self._process.wait())} before it was ready: see its log above") from error
        if isinstance(answer, MmembError):
            raise answer
        return answer

    async def _watch(self, heard: Callable[[Report], None], lost: asyncio.Future[None]) -> None:
        await lost
        code = await asyncio.to_thread(self._process.wait)
        if not self._stopping:
            death = self._death(code)
            LOGGER.critical("%s: no request can be answered any more", death)
            heard(Report(defect=death))

    @staticmethod
    def _death(code: int) -> str:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        return f"the engine's process has ended with {how}"


class Reports(asyncio.Protocol):
    """Hands on what comes from the engine's process."""

    def __init__(self, heard: Callable[[Report], None], lost: asyncio.Future[None]) -> None:
        self._frames, self._heard, self._lost = Frames(), heard, lost

    def data_received(self, data: bytes) -> None:
        """Hand on all reports that are whole."""
        for report in self._frames.feed(data):
            self._heard(report)

    def connection_lost(self, exc: Exception | None) -> None:
        """Say that no more can come."""
        del exc
        self._lost.set_result(None)


class Channel:
    """Python objects through a socket that blocks."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._frames = connected, Frames()
        self._come: list[Any] = []  # and not yet returned

    def send(self, content: object) -> None:
        """Send an object."""
        self._socket.sendall(packed(content))

    def receive_one(self) -> Any:
        """Return the next object, and leave those that come with it. Raises EOFError where the other side has gone."""
        first, *self._come = self.receive()
        return first

    def receive(self, wait: bool = True) -> list[Any]:
        """Return the objects that have come, at least one where it may wait.

        One that has begun to come is waited for: an image is larger than what a socket holds, and what follows it would
        wait for as many runs as it has parts. Raises EOFError where the other side has gone.
        """
        found, self._come = self._come, []
        while not found or self._frames.begun:
            waits = wait or self._frames.begun
            try:
                chunk = self._socket.recv(CHUNK, 0 if waits else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if not chunk:
                raise EOFError("the other process has gone")
            found += self._frames.feed(chunk)
        return found


class Frames:
    """Cuts what arrives into the objects that were packed."""

    def __init__(self) -> None:
        self._rest = bytearray()

    @property
    def begun(self) -> bool:
        """Whether there is a part of an object."""
        return bool(self._rest)

    def feed(self, chunk: bytes) -> list[Any]:
        """Return the objects that are whole now."""
        self._rest += chunk
        found, start, end = list[Any](), SIZE, self._end(0)
        while end <= len(self._rest):
            with memoryview(self._rest)[start:end] as pickled:
                found.append(pickle.loads(pickled))
            start, end = end + SIZE, self._end(end)
        del self._rest[: start - SIZE]
        return found

    def _end(self, start: int) -> int:
        return start + SIZE + int.from_bytes(self._rest[start : start + SIZE], "little")


def packed(content: object) -> memoryview:
    """Return an object as it is sent: its size, then itself."""
    buffer = io.BytesIO()
    buffer.write(bytes(SIZE))
    pickle.dump(content, buffer, pickle.HIGHEST_PROTOCOL)
    view = buffer.getbuffer()
    view[:SIZE] = (len(view) - SIZE).to_bytes(SIZE, "little")
    return view


def main(descriptor: int) -> None:
    """Serve the process that started this one until it says so, or goes; signals are for that one to answer."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):  # of a process that has gone
        _serve(Channel(socket.socket(fileno=descriptor)))


def _serve(channel: Channel) -> None:
    setup: Setup = channel.receive_one()
    log_json(setup.log_level)
    try:
        embedder = Embedder.of_bundle(setup.bundle, backend=setup.backend, device=setup.device, threads=setup.threads)
    except MmembError as error:
        channel.send(error)
        return
    channel.send(embedder.backend)
    while isinstance(asked := channel.receive_one(), Documents):
        try:
            channel.send(embedder.encode_document(asked.inputs))
        except MmembError as error:
            channel.send(error)
    gc.freeze()  # as the service does, for the same reason
    run(Worker(embedder, setup.limits), channel.receive, channel.send)
