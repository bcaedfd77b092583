"""A server of the embedded bundle on a free port, in a thread of this process."""

import base64
import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
from PIL import Image

from mmemb_deploy import Embedder
from mmemb_deploy.serve.app import create_app
from mmemb_deploy.serve.server import DrainingServer, server_of
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.settings import settings_of


class Served:
    """A server that runs, and a client for it."""

    def __init__(self, server: DrainingServer, service: Service, port: int) -> None:
        self.server, self.service, self.port = server, service, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


MakeServer = Callable[..., AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return Embedder.load()


@pytest.fixture(scope="session")
def serve(embedder: Embedder) -> MakeServer:
    """Run a server with these settings; `service`, `reader`, `traces`, `digest` and `gallery` go to the application."""

    @contextmanager
    def serving(**options: Any) -> Generator[Served]:
        parts = {name: options.pop(name) for name in ("reader", "traces", "digest", "gallery") if name in options}
        service = options.pop("service", None) or Service(embedder)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            settings = settings_of(port=port, drain_seconds=5, **options)
            server = server_of(create_app(service, settings, **parts), service, settings)
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            running = Served(server, service, port)
            try:
                yield running
            finally:
                running.client.close()
                server.should_exit = True
                thread.join()

    return serving


@pytest.fixture(scope="session")
def served(serve: MakeServer) -> Iterator[Served]:
    """A server with the settings that are the default."""
    with serve(digest="a digest") as running:
        yield running


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    image = Image.new("RGB", (40, 30), "white")
    image.paste("black", (10, 5, 20, 25))
    return image


@pytest.fixture(scope="session")
def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[dict[str, Any]]]:
    """What was logged of so many requests since the test began; awaited, as an answer may come before its line."""
    caplog.set_level(logging.INFO, logger="mmemb_deploy.serve")

    def logged(count: int) -> list[dict[str, Any]]:
        until = time.monotonic() + 20
        while True:
            found = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "request"]
            if len(found) >= count or time.monotonic() > until:
                return found
            time.sleep(0.005)

    return logged
