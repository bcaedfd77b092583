"""Which inputs are prepared where they arrive, since that takes less than to ask a thread to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mmemb_deploy.inputs.images import pixels_of

CHARACTERS = 2048  # of all inputs of a request; they take half a millisecond
EACH = 200  # characters that any text or image takes as long as, however small
PIXELS = 4  # that take as long as a character
ENCODED = 16384  # bytes of an encoded image, whose header is read to tell


def is_light(inputs: Sequence[Any]) -> bool:
    """Return whether texts and images are few and small; what is no input at all is not."""
    left = float(CHARACTERS)
    for given in inputs:
        for part in _parts(given):
            left -= EACH + _size(part)
            if left < 0:
                return False
    return True


def _parts(given: Any) -> Iterator[Any]:
    """Yield the texts and images of an input, None for what is neither."""
    if not isinstance(given, dict):
        yield given
        return
    if not given.keys() <= {"text", "image", "images"}:
        yield None
    if (text := given.get("text", "")) != "":
        yield text if isinstance(text, str) else None
    if "image" in given:
        yield _image(given["image"])
    images = given.get("images", ())
    yield from map(_image, images if isinstance(images, (list, tuple)) else [None])


def _image(given: Any) -> Any:
    return None if isinstance(given, str) else given  # the path of a file


def _size(part: Any) -> float:
    """Return the characters that a text or an image is worth."""
    if isinstance(part, str):
        return len(part)
    pixels = None if isinstance(part, bytes) and len(part) > ENCODED else pixels_of(part)
    return math.inf if pixels is None else pixels / PIXELS
