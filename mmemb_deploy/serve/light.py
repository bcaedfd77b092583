"""Which inputs are prepared where they arrive, since that takes less than to ask a thread to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmemb_deploy.inputs.images import pixels_of

CHARACTERS = 2048  # of all inputs of a request; they take half a millisecond
PIXELS = 4  # that take as long as a character
ENCODED = 16384  # bytes of an encoded image, whose header is read to tell


def is_light(inputs: Sequence[Any]) -> bool:
    """Return whether texts and images are few and small; what is no input at all is not."""
    left = float(CHARACTERS)
    for each in inputs:
        left -= _effort(each)
        if left < 0:
            return False
    return True


def _effort(given: Any) -> float:
    """Return the characters that an input is worth."""
    if isinstance(given, str):
        return len(given)
    if not isinstance(given, dict):
        return _effort_of_image(given)
    text, images = given.get("text", ""), given.get("images", [given["image"]] if "image" in given else [])
    known = given.keys() <= {"text", "image", "images"} and isinstance(text, str) and isinstance(images, (list, tuple))
    return len(text) + sum(map(_effort_of_image, images)) if known else float("inf")


def _effort_of_image(image: Any) -> float:
    if isinstance(image, bytes) and len(image) > ENCODED:
        return float("inf")
    pixels = pixels_of(image)
    return float("inf") if pixels is None else pixels / PIXELS
