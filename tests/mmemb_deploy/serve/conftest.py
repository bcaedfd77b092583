"""What the tests of the server share: one that runs, a picture, and what was logged."""

import base64
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

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
