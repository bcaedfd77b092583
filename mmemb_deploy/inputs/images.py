"""One image in any accepted form, decoded to RGB.

EXIF orientation is applied, transparency is laid over white as transformers does, and samples of 16 bits are scaled to
8 (Pillow's own conversion would clip them to white). Of an animation the first picture counts.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import struct
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mmemb_deploy.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # no format that runs another program

_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, AssertionError, struct.error)
"""What Pillow's decoders raise on damaged files."""


def load_image(value: object, name: str, max_pixels: int) -> Image.Image:
    """Return an image in any accepted form as RGB, upright and decoded.

    `value` is a PIL image, encoded bytes, a local path or an array (`shared_array`); `name` is what errors call it.
    Raises InputError for anything else, for a damaged image, and for more than `max_pixels` pixels, which are counted
    before decoding.
    """
    if (array := shared_array(value, name)) is not None:
        return _rgb(_from_array(array, name, max_pixels), name)
    source: object = value
    if isinstance(value, (bytes, bytearray)):
        source = io.BytesIO(value)
    elif isinstance(value, (str, Path)):
        source = local_path(str(value), name)
        name = f"{name} ({shown_value(source)})"
    elif not isinstance(value, Image.Image):
        raise InputError(f"{name} is of type {type(value).__name__}; pass a PIL image, an array, bytes or a path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large headers, which `max_pixels` judges, and of damaged metadata
            if isinstance(source, Image.Image):
                return _decoded(source, name, max_pixels)
            with Image.open(cast("str | io.BytesIO", source), formats=FORMATS) as image:
                return _decoded(image, name, max_pixels, is_ours=True)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} has too many pixels for max_image_pixels = {max_pixels} and for Pillow ({error}); "
            "resize it before embedding"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is no image of a known format; pass one of {', '.join(FORMATS)}") from error
    except _BROKEN_IMAGE as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{name} cannot be decoded ({reason}); pass one that is whole, and load it before you close its file"
        ) from error


def pixels_of(value: object) -> int | None:
    """Return the pixels of an image in memory, which is not decoded for that; None for anything else, or if damaged."""
    try:
        if isinstance(value, bytes):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as `load_image` does
                with Image.open(io.BytesIO(value), formats=FORMATS) as image:
                    return math.prod(image.size)
        if isinstance(value, Image.Image):
            return math.prod(value.size)
    except (Image.DecompressionBombError, *_BROKEN_IMAGE):
        return None
    return math.prod(value.shape[:2]) if isinstance(value, np.ndarray) else None


def shared_array(value: object, name: str) -> NDArray[Any] | None:
    """Return an array, or what another library shares through DLPack as one (a torch tensor); None for anything else.

    Raises InputError where its memory is not the CPU's and cannot be copied there.
    """
    if isinstance(value, np.ndarray):
        return cast("NDArray[Any]", value)
    if not hasattr(value, "__dlpack__"):
        return None
    try:
        return np.from_dlpack(cast("Any", value), device="cpu")
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} is a {type(value).__name__} that numpy cannot read ({error}); copy it to the CPU first, as "
            "tensor.cpu() does"
        ) from error


def local_path(path: str, name: str) -> str:
    """Return the path of a file. Raises InputError for a URL, and where there is no file."""
    if re.match(r"(?i)[a-z][a-z0-9+.-]+:/|data:", path):
        raise InputError(f"{name} is the URL {shown_value(path)}; download it first and pass the path or the bytes")
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a name is too long
        raise InputError(f"{name} is the path {shown_value(path)}, where there is no file; correct the path")
    return path


def _decoded(image: Image.Image, name: str, max_pixels: int, *, is_ours: bool = False) -> Image.Image:
    _check_pixels(image.size, name, max_pixels)
    if is_ours:  # else it is copied, which takes a fifth of what a photo takes
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image, name)
    return _rgb(ImageOps.exif_transpose(image), name)


def _from_array(array: NDArray[Any], name: str, max_pixels: int) -> Image.Image:
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        hint = "move the channels last: " if array.ndim == 3 and array.shape[0] in (1, 3) else ""
        raise InputError(
            f"{name} is an array of shape {array.shape}; {hint}pass (height, width) or (height, width, 1, 3 or 4)"
        )
    _check_pixels((array.shape[1], array.shape[0]), name, max_pixels)
    return Image.fromarray(_uint8(array.squeeze(2) if array.shape[2:] == (1,) else array, name))


def _uint8(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinity; pass finite values within 0..1")
        if array.min() < 0 or array.max() > 1:
            raise InputError(
                f"{name} has float values within {array.min()}..{array.max()}; "
                "scale them to 0..1, or pass uint8 within 0..255"
            )
        return np.round(array * np.float64(255)).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{name} is an array of {array.dtype}; pass uint8 within 0..255, or float within 0..1")
    return array


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert to RGB as transformers' `convert_to_rgb` does, but scale 16-bit and float samples instead of clipping."""
    if image.mode.startswith("I"):  # "I" is where Pillow's decoders put 16-bit samples that do not fit "I;16"
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise InputError(
                f"{name} has integer samples within {samples.min()}..{samples.max()}, beyond 16 bits; convert it to 8"
            )
        image = Image.fromarray(np.round(samples / 257).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(_uint8(np.asarray(image), name))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    pixels = size[0] * size[1]
    if pixels == 0:
        raise InputError(f"{name} is {pixel_size(size)} pixels, so it shows nothing; pass at least 1 x 1")
    if pixels > max_pixels:
        raise InputError(
            f"{name} is {pixel_size(size)} pixels, above max_image_pixels = {max_pixels}; resize it before embedding"
        )


def data_uri(image: Image.Image, form: str = "PNG", **options: Any) -> str:
    """Return an image as a data URI, encoded by Pillow in a form and with the form's options."""
    encoded = io.BytesIO()
    image.save(encoded, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def pixel_size(size: tuple[int, int]) -> str:
    """Return "width x height"."""
    return f"{size[0]} x {size[1]}"


def shown_value(value: object) -> str:
    """Return a value's repr, short enough for a message."""
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:100] + "..."
