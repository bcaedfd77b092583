"""What a caller may pass to `encode`, checked and decoded into a frozen Request before anything runs.

An input is a str, a PIL image, an array, or a dict with any of "text", "image" or "images", and "video":

    "three plus four"                                    a text, whatever it says: never opened, never fetched
    Image.open("photo.png")                              an image
    {"text": "what is the sum?", "image": "photo.png"}   in a dict, a str or Path in place of an image is a local file
    {"images": [first, second]}                          several images, in order
    {"video": frames, "fps": 1.0}                        frames in order; or "timestamps", in seconds, one per frame

An image is a PIL image, the bytes of an encoded image, a path, or an array of shape (H, W), (H, W, 1), (H, W, 3) or
(H, W, 4) that is uint8, or float within 0..1; `images` says how it becomes RGB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from mmemb_deploy.errors import InputError, OptionError, check_known
from mmemb_deploy.inputs.images import load_image, pixel_size, shared_array, shown_value

KEYS = ("text", "image", "images", "video", "fps", "timestamps")
DEFAULT_FPS = 2.0  # frames per second of a video that names no times: the rate at which Qwen3-VL samples


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest input that is accepted; an input above a limit is refused, never cut."""

    max_text_chars: int = 200_000
    """Characters of the text."""

    max_image_pixels: int = 100_000_000
    """Pixels of each image or frame, read from its header before it is decoded."""

    max_images: int = 64
    """Images of one input, video frames not counted."""

    max_frames: int = 768
    """Frames of one video."""


@dataclass(frozen=True)
class Request:
    """One input, ready for preprocessing: every image and frame is RGB, upright and decoded."""

    text: str
    images: tuple[Image.Image, ...]
    frames: tuple[Image.Image, ...]  # of one size
    timestamps: tuple[float, ...]  # seconds, one per frame, never falling
    next_timestamp: float = 0.0  # of the frame that would follow


def parse(item: object, limits: Limits = Limits()) -> Request:
    """Check and decode one input.

    Raises InputError, without an index, that names the part, its value and the fix: for a type, key, shape, dtype or
    value that is not accepted, a file or bytes that hold no whole image, a part above its limit, or nothing to embed.
    """
    parts = _parts(item)
    text = _text(parts.get("text", ""), limits)
    images = _images(parts, limits)
    video = _video(parts["video"], limits) if "video" in parts else ()
    timestamps, next_timestamp = _timestamps(parts, len(video))
    if not (text.strip() or images or video):
        raise InputError("there is nothing to embed: give a text that is not blank, an image or a video")
    return Request(
        text,
        tuple(load_image(image, name, limits.max_image_pixels) for name, image in images),
        _frames(video, limits),
        timestamps,
        next_timestamp,
    )


def _parts(item: object) -> Mapping[str, object]:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Image.Image) or hasattr(item, "__dlpack__"):  # arrays among them
        return {"image": item}
    if not isinstance(item, Mapping):
        kind = type(item).__name__
        hint = "; for an image pass {'image': ...}" if isinstance(item, (bytes, bytearray, Path)) else ""
        raise InputError(f"an input of type {kind} is not accepted: pass a str, a PIL image, an array or a dict{hint}")
    parts = cast("Mapping[str, object]", item)
    for key, value in parts.items():
        try:
            check_known("key", str(key), KEYS)
        except OptionError as error:
            raise InputError(str(error)) from error
        if value is None:
            raise InputError(f"{key!r} is None; leave the key out where there is nothing")
    return parts


def _text(text: object, limits: Limits) -> str:
    if not isinstance(text, str):
        raise InputError(f"'text' is of type {type(text).__name__}; pass a str")
    if len(text) > limits.max_text_chars:
        raise InputError(
            f"'text' has {len(text)} characters, above max_text_chars = {limits.max_text_chars}; shorten or split it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"'text' has a lone surrogate at character {error.start}, which is no Unicode text; "
            "decode its bytes with errors='replace'"
        ) from error
    return text


def _images(parts: Mapping[str, object], limits: Limits) -> list[tuple[str, object]]:
    """Return the images with the names that errors call them by."""
    if "image" in parts and "images" in parts:
        raise InputError("'image' and 'images' are both given; put every image into 'images'")
    if "image" in parts:
        return [("'image'", parts["image"])]
    images = parts.get("images", [])
    if not isinstance(images, (list, tuple)):
        raise InputError(f"'images' is of type {type(images).__name__}; pass a list of images, or one as 'image'")
    images = cast("Sequence[object]", images)
    if len(images) > limits.max_images:
        raise InputError(f"'images' has {len(images)} images, above max_images = {limits.max_images}; pass fewer")
    return [(f"'images'[{index}]", image) for index, image in enumerate(images)]


def _video(video: object, limits: Limits) -> Sequence[object]:
    if (array := shared_array(video, "'video'")) is not None:
        if array.ndim != 4:
            raise InputError(f"'video' is an array of shape {array.shape}; pass (frames, height, width, 3)")
        video = list(array)
    if not isinstance(video, (list, tuple)):
        raise InputError(
            f"'video' is of type {type(video).__name__}; decode it and pass a list of frames or one uint8 array "
            "of shape (frames, height, width, 3)"
        )
    frames = cast("Sequence[object]", video)
    if not frames:
        raise InputError("'video' has no frames; pass at least one, or leave the key out")
    if len(frames) > limits.max_frames:
        raise InputError(f"'video' has {len(frames)} frames, above max_frames = {limits.max_frames}; sample fewer")
    return frames


def _frames(video: Sequence[object], limits: Limits) -> tuple[Image.Image, ...]:
    frames = tuple(load_image(frame, f"'video'[{index}]", limits.max_image_pixels) for index, frame in enumerate(video))
    for index, frame in enumerate(frames):
        if frame.size != frames[0].size:
            raise InputError(
                f"'video'[{index}] is {pixel_size(frame.size)} pixels but 'video'[0] is {pixel_size(frames[0].size)}; "
                "resize the frames to one size"
            )
    return frames


def _timestamps(parts: Mapping[str, object], frames: int) -> tuple[tuple[float, ...], float]:
    given = [key for key in ("fps", "timestamps") if key in parts]
    if given and not frames:
        raise InputError(f"{given[0]!r} is given without a 'video'; add the video or leave it out")
    if len(given) == 2:
        raise InputError("'fps' and 'timestamps' are both given; keep the one that tells the frames' times")
    if "timestamps" not in parts:
        fps = _number(parts.get("fps", DEFAULT_FPS), "'fps'")
        if fps <= 0:
            raise InputError(f"'fps' is {fps}; pass the frames per second, above 0")
        return tuple(index / fps for index in range(frames)), frames / fps
    times = parts["timestamps"]
    if isinstance(times, np.ndarray):
        times = cast("object", times.tolist())
    if not isinstance(times, (list, tuple)):
        raise InputError(f"'timestamps' is of type {type(times).__name__}; pass a list of seconds, one per frame")
    times = cast("Sequence[object]", times)
    if len(times) != frames:
        raise InputError(f"'timestamps' has {len(times)} times for {frames} frames; pass one per frame")
    seconds = tuple(_number(time, f"'timestamps'[{index}]") for index, time in enumerate(times))
    for index, (before, after) in enumerate(zip((0.0, *seconds), seconds, strict=False)):
        if after < before:
            raise InputError(
                f"'timestamps'[{index}] is {after} s, below {before} s before it; "
                "pass times from 0 s that never fall, and the frames in that order"
            )
    return seconds, seconds[-1] + (seconds[-1] - seconds[-2] if frames > 1 else 1 / DEFAULT_FPS)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{name} is {shown_value(value)}; pass a finite number")
    return float(value)
