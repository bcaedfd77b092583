"""What the tests of the server share: one that runs, a picture, and what was logged."""

import base64
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from mmemb_deploy import Embedder


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return Embedder.load()


@pytest.fixture(scope="session")
def served(serve: Any) -> Iterator[Any]:
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
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[list[httpx.Response]], list[dict[str, Any]]]:
    """What was logged of these answers, in their order; awaited, as an answer may come before its line."""
    caplog.set_level(logging.INFO, logger="mmemb_deploy.serve")

    def logged(answers: list[httpx.Response]) -> list[dict[str, Any]]:
        ids = [answer.headers["X-Request-ID"] for answer in answers]
        until = time.monotonic() + 20
        while True:
            said = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "request"]
            found = {line.get("client_request_id", line["request_id"]): line for line in said}
            if set(ids) <= set(found) or time.monotonic() > until:
                return [found[each] for each in ids if each in found]
            time.sleep(0.005)

    return logged
