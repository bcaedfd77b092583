"""What is prepared in the event loop is little."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmemb_deploy.inputs.images import pixels_of
from mmemb_deploy.serve.light import CHARACTERS, EACH, ENCODED, PIXELS, is_light

LONGEST = CHARACTERS - EACH
MOST = int((LONGEST * PIXELS) ** 0.5)  # pixels along a side


def encoded(side: int, form: str = "PNG") -> bytes:
    """Return an image of one colour: many pixels in a few bytes."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    "given",
    [
        "x" * LONGEST,
        {"text": "x" * LONGEST},
        Image.new("L", (MOST, MOST)),
        np.zeros((MOST, MOST, 3), np.uint8),
        {"image": encoded(MOST)},
        {"text": "x", "images": [encoded(MOST // 3, "JPEG")] * 3},
    ],
    ids=["text", "dict", "picture", "array", "encoded", "three"],
)
def test_small_inputs_are_light_until_they_are_many(given: Any) -> None:
    assert is_light([given])
    assert not is_light([given] * 2)


@pytest.mark.parametrize("tiny", ["x", {"image": encoded(1)}, Image.new("L", (1, 1))], ids=["text", "encoded", "open"])
def test_however_small_inputs_are_they_are_few(tiny: Any) -> None:
    assert is_light([tiny] * 8)
    assert not is_light([tiny] * 16)
    assert not is_light([{"images": [encoded(1)] * 16}])


@pytest.mark.parametrize(
    "given",
    [
        {"image": encoded(MOST + 1)},
        {"image": encoded(MOST)[:20]},
        {"image": encoded(4) + bytes(ENCODED)},
        {"image": "photo.png"},
        {"image": None},
        {"images": "photo.png"},
        {"text": 3},
        {"video": [np.zeros((4, 4, 3), np.uint8)]},
        {"document": b"%PDF-"},
        {"unknown": 1},
        None,
        3,
        b"bytes",
    ],
    ids=str,
)
def test_what_is_large_or_unknown_or_wrong_is_left_to_the_reader(given: Any) -> None:
    assert not is_light(["a text", given])


def test_pixels_are_counted_before_an_image_is_decoded() -> None:
    assert pixels_of(encoded(3000)) == 3000**2
    assert pixels_of(Image.new("RGB", (3, 2))) == 6
    assert pixels_of(np.zeros((3, 2), np.uint8)) == 6
    assert pixels_of(encoded(3000, "GIF")[:10]) is None


def test_a_large_header_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert pixels_of(encoded(120)) == 120**2  # of which Pillow warns
    assert pixels_of(encoded(150)) is None  # which it refuses
