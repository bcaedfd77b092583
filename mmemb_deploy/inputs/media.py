"""Video files and documents: what is read of them, by processes that decode them apart (`decoder`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from mmemb_deploy.errors import InputError, MissingExtraError
from mmemb_deploy.inputs.decoder import DECODERS
from mmemb_deploy.inputs.images import local_path, shown_value
from mmemb_deploy.inputs.limits import DEFAULTS, Limits
from mmemb_deploy.inputs.preprocess import VisionSpec
from mmemb_deploy.inputs.sampling import FPS, Sampling

PAGES, FRAMES = "pypdfium2", "av"  # what reads documents, and video files


@dataclass(frozen=True)
class Source:
    """A file: its absolute path, or its bytes, and what errors call it."""

    content: str | bytes
    name: str


@dataclass(frozen=True)
class Clip:
    """Frames (RGB, of one size) with their times in seconds; `fitted` where they have the size that the model reads."""

    frames: tuple[Image.Image, ...] = ()
    timestamps: tuple[float, ...] = ()
    next_timestamp: float = 0.0
    fitted: bool = False


@dataclass(frozen=True)
class Pages:
    """Pages of a document (RGB) and their numbers, counted from 1."""

    images: tuple[Image.Image, ...] = ()
    numbers: tuple[int, ...] = ()


def open_source(value: object, name: str, limits: Limits) -> Source | None:
    """Return a file by its path or bytes; None for what is neither.

    Raises InputError for a URL, a path where there is no file, and a file that is empty or above `max_media_bytes`.
    """
    if isinstance(value, (bytes, bytearray)):
        source, size = Source(bytes(value), name), len(value)
    elif isinstance(value, (str, Path)):
        path = Path(local_path(str(value), name))
        source, size = Source(str(path.absolute()), f"{name} ({shown_value(str(value))})"), path.stat().st_size
    else:
        return None
    if not size:
        raise InputError(f"{source.name} is empty; pass a file that holds something")
    if size > limits.max_media_bytes:
        raise InputError(
            f"{source.name} has {size} bytes, above max_media_bytes = {limits.max_media_bytes}; pass a smaller one, or "
            "split it"
        )
    return source


def read_video(source: Source, sampling: Sampling, limits: Limits, vision: VisionSpec) -> Clip:
    """Return the frames that are sampled of a video file, in the size that the model reads.

    Raises InputError for a file that holds no frames, is broken, or is above a limit; MissingExtraError without av.
    """
    facts, pictures = _ask(source, limits, FRAMES, "frames", sampling=asdict(sampling), vision=asdict(vision))
    times: list[float] = facts["times"]
    step = times[-1] - times[-2] if len(times) > 1 else 1 / (sampling.fps or FPS[vision.resize])
    return Clip(tuple(map(Image.fromarray, pictures)), tuple(times), times[-1] + step, fitted=True)


def read_pages(source: Source, numbers: tuple[int, ...] | None, most: int, limits: Limits, vision: VisionSpec) -> Pages:
    """Return pages of a document, all where `numbers` is None, `most` at most.

    Raises InputError for a document that is encrypted, broken, empty or above a limit, and for a page that it does not
    have; MissingExtraError without pypdfium2.
    """
    facts, pictures = _ask(source, limits, PAGES, "pages", numbers=numbers, most=most, vision=asdict(vision))
    return Pages(tuple(map(Image.fromarray, pictures)), tuple(facts["numbers"]))


def page_count(document: str | Path | bytes, limits: Limits = DEFAULTS) -> int:
    """Return how many pages a PDF has, a path or its bytes. Raises InputError and MissingExtraError as `read_pages`."""
    pages: int = _ask(_file(document, "'document'", limits), limits, PAGES, "page count")[0]["pages"]
    return pages


def duration(video: str | Path | bytes, limits: Limits = DEFAULTS) -> float:
    """Return the seconds from a video file's first frame to the end of its last, a path or its bytes.

    Raises InputError and MissingExtraError as `read_video`.
    """
    seconds: float = _ask(_file(video, "'video'", limits), limits, FRAMES, "duration")[0]["seconds"]
    return seconds


def pages(document: str | Path | bytes, limits: Limits = DEFAULTS) -> list[dict[str, Any]]:
    """Return an input for each page of a PDF, a path or its bytes, so that each page becomes a vector of its own.

    Raises InputError for a document that is encrypted, broken, empty or above a limit; MissingExtraError without
    pypdfium2.

    Example:
        vectors = embedder.encode_document(pages("paper.pdf"))
    """
    return [{"document": document, "pages": [number]} for number in range(1, page_count(document, limits) + 1)]


def _file(value: object, name: str, limits: Limits) -> Source:
    source = open_source(value, name, limits)
    if source is None:
        raise InputError(f"{name} is of type {type(value).__name__}; pass the path of a file, or its bytes")
    return source


def _ask(source: Source, limits: Limits, library: str, task: str, **details: Any) -> tuple[dict[str, Any], Any]:
    if find_spec(library) is None:
        raise MissingExtraError(library, "media")
    try:
        return DECODERS.ask(source.content, limits, task, **details)
    except InputError as error:
        raise InputError(f"{source.name} {error.message}") from error
