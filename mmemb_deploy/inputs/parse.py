"""What a caller may pass to `encode`, checked and decoded into a frozen Request before anything runs.

An input is a str, a PIL image, an array, or a dict with any of "text", "image" or "images", "video", and "document":

    "three plus four"                                    a text, whatever it says: never opened, never fetched
    Image.open("photo.png")                              an image
    {"text": "what is the sum?", "image": "photo.png"}   in a dict, a str or Path in place of an image is a local file
    {"images": [first, second]}                          several images, in order
    {"video": frames, "fps": 1.0}                        frames in order; or "timestamps", in seconds, one per frame
    {"video": "clip.mp4"}                                a video file, of which frames are sampled
    {"video": "clip.mp4", "fps": 1.0, "max_frames": 16}  so many a second, so many at most
    {"video": "clip.mp4", "start": 10, "end": 20}        those from second 10 to second 20
    {"document": "paper.pdf"}                            a PDF: its pages are the images of one input, in order
    {"document": "paper.pdf", "pages": [3]}              page 3 of it, counted from 1

An image is a PIL image, the bytes of an encoded image, a path, or an array of shape (H, W), (H, W, 1), (H, W, 3) or
(H, W, 4) that is uint8, or float within 0..1; `images` says how it becomes RGB. A video file and a document are a path
or the file's bytes; `video` says how frames are sampled, `pdf` how pages are rendered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from mmemb_deploy.errors import InputError, OptionError, check_known
from mmemb_deploy.inputs.images import load_image, pixel_size, shared_array, shown_value
from mmemb_deploy.inputs.limits import DEFAULTS, Limits
from mmemb_deploy.inputs.media import Clip, Pages, open_source, read_pages, read_video
from mmemb_deploy.inputs.preprocess import QWEN3_VL, VisionSpec
from mmemb_deploy.inputs.sampling import Sampling

OF_FILES = ("max_frames", "start", "end")  # keys that say how a video file is sampled
KEYS = ("text", "image", "images", "video", "fps", "timestamps", *OF_FILES, "document", "pages")
DEFAULT_FPS = 2.0  # frames per second of a video that names no times: the rate at which Qwen3-VL samples


@dataclass(frozen=True)
class Request:
    """One input, ready for preprocessing: every image and frame is RGB, upright and decoded."""

    text: str
    images: tuple[Image.Image, ...]  # those of a document, its pages, come last
    frames: tuple[Image.Image, ...]  # of one size
    timestamps: tuple[float, ...]  # seconds, one per frame, never falling
    next_timestamp: float = 0.0  # of the frame that would follow
    pages: tuple[int, ...] = ()  # of the document, counted from 1
    fitted: VisionSpec | None = None  # whose size the frames have already, where they come from a file


def parse(item: object, limits: Limits = DEFAULTS, vision: VisionSpec = QWEN3_VL) -> Request:
    """Check and decode one input.

    `vision` says how many frames of a video file are sampled, and how large they and the pages of a document become:
    what `RowEncoder.vision` is where the request goes to a RowEncoder. Files are decoded by a process of their own,
    which has `limits.max_media_seconds` and a bound on its memory, so that no file hangs or ends the caller.

    Raises InputError, without an index, that names the part, its value and the fix: for a type, key, shape, dtype or
    value that is not accepted, a file or bytes that hold no whole image, video or document, a part above its limit, or
    nothing to embed. Raises MissingExtraError for a video file or a document where the extra `media` is missing.
    """
    parts = _parts(item)
    text = _text(parts.get("text", ""), limits)
    images = _images(parts, limits)
    document = _document(parts, limits.max_images - len(images), limits, vision)
    video = _video(parts, limits, vision)
    if not (text.strip() or images or document or video):
        raise InputError("there is nothing to embed: give a text that is not blank, an image, a video or a document")
    shown = tuple(load_image(image, name, limits.max_image_pixels) for name, image in images)
    pages = document() if document else Pages()
    clip = video() if video else Clip()
    return Request(
        text,
        (*shown, *pages.images),
        clip.frames,
        clip.timestamps,
        clip.next_timestamp,
        pages.numbers,
        vision if clip.fitted else None,
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


def _document(parts: Mapping[str, object], most: int, limits: Limits, vision: VisionSpec) -> Callable[[], Pages] | None:
    """Return what renders the document's pages, `most` at most."""
    if "document" not in parts:
        if "pages" in parts:
            raise InputError("'pages' is given without a 'document'; add the document or leave it out")
        return None
    source = open_source(parts["document"], "'document'", limits)
    if source is None:
        raise InputError(
            f"'document' is of type {type(parts['document']).__name__}; pass the path of a PDF file, or its bytes"
        )
    numbers = _page_numbers(parts["pages"], most, limits) if "pages" in parts else None
    return lambda: read_pages(source, numbers, most, limits, vision)


def _page_numbers(pages: object, most: int, limits: Limits) -> tuple[int, ...]:
    if not isinstance(pages, (list, tuple, range)):
        raise InputError(f"'pages' is of type {type(pages).__name__}; pass a list of page numbers, counted from 1")
    numbers = cast("Sequence[object]", pages)
    if not numbers:
        raise InputError("'pages' is empty; name at least one page, or leave it out for all")
    if len(numbers) > most:
        raise InputError(f"'pages' has {len(numbers)} pages, above max_images = {limits.max_images}; name fewer")
    for index, number in enumerate(numbers):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"'pages'[{index}] is {shown_value(number)}; pass whole numbers, counted from 1")
    return tuple(cast("Sequence[int]", numbers))


def _video(parts: Mapping[str, object], limits: Limits, vision: VisionSpec) -> Callable[[], Clip] | None:
    """Return what decodes the video."""
    if "video" not in parts:
        if given := [key for key in ("fps", "timestamps", *OF_FILES) if key in parts]:
            raise InputError(f"{given[0]!r} is given without a 'video'; add the video or leave it out")
        return None
    source = open_source(parts["video"], "'video'", limits)
    if source is not None:
        sampling = _sampling(parts, limits)
        return lambda: read_video(source, sampling, limits, vision)
    if given := [key for key in OF_FILES if key in parts]:
        raise InputError(
            f"{given[0]!r} says what to take of a video file, and 'video' holds frames; pass those you want"
        )
    frames = _given_frames(parts["video"], limits)
    times = _timestamps(parts, len(frames))
    return lambda: Clip(_frames(frames, limits), *times)


def _sampling(parts: Mapping[str, object], limits: Limits) -> Sampling:
    if "timestamps" in parts:
        raise InputError("'timestamps' are those of frames, and a video file has its own; leave them out")
    fps = _positive(parts["fps"], "'fps'") if "fps" in parts else None
    most = parts.get("max_frames")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= limits.max_frames):
        raise InputError(
            f"'max_frames' is {shown_value(most)}; pass a whole number from 1 to max_frames = {limits.max_frames}"
        )
    start = _number(parts.get("start", 0.0), "'start'")
    end = _number(parts["end"], "'end'") if "end" in parts else None
    if start < 0 or (end is not None and end <= start):
        raise InputError(
            f"'start' is {start:g} s and 'end' is {'not given' if end is None else f'{end:g} s'}; "
            "pass seconds from 0 on, the end after the start"
        )
    return Sampling(fps, most, start, end)


def _given_frames(video: object, limits: Limits) -> Sequence[object]:
    if (array := shared_array(video, "'video'")) is not None:
        if array.ndim != 4:
            raise InputError(f"'video' is an array of shape {array.shape}; pass (frames, height, width, 3)")
        video = list(array)
    if not isinstance(video, (list, tuple)):
        raise InputError(
            f"'video' is of type {type(video).__name__}; pass the path of a video file, its bytes, a list of frames, "
            "or one uint8 array of shape (frames, height, width, 3)"
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
    if "fps" in parts and "timestamps" in parts:
        raise InputError("'fps' and 'timestamps' are both given; keep the one that tells the frames' times")
    if "timestamps" not in parts:
        fps = _positive(parts.get("fps", DEFAULT_FPS), "'fps'")
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


def _positive(value: object, name: str) -> float:
    number = _number(value, name)
    if number <= 0:
        raise InputError(f"{name} is {number}; pass the frames per second, above 0")
    return number


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{name} is {shown_value(value)}; pass a finite number")
    return float(value)
