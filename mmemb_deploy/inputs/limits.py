"""The largest input that a bundle accepts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest input that is accepted; an input above a limit is refused, never cut."""

    max_text_chars: int = 200_000
    """Characters of the text."""

    max_image_pixels: int = 100_000_000
    """Pixels of each image or frame, read from its header before it is decoded."""

    max_images: int = 64
    """Images and pages of one input, video frames not counted."""

    max_frames: int = 768
    """Frames of one video; of a file, those that are sampled."""

    max_pages: int = 10_000
    """Pages that a document has, whichever of them are embedded."""

    max_media_bytes: int = 4 * 2**30
    """Bytes of a video file or a document."""

    max_media_seconds: float = 120.0
    """Seconds that opening and decoding a video file, or the pages of a document, may take."""


DEFAULTS = Limits()
