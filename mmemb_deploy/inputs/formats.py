"""The one table of file suffixes: which kind of input a file is."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

Kind = Literal["image", "text", "document", "video"]

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2"),
    "text": (".txt", ".md"),
    "document": (".pdf",),
    "video": (
        ".mp4",
        ".m4v",
        ".mov",
        ".3gp",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".m2ts",
        ".flv",
        ".wmv",
        ".ogv",
    ),
}

_KINDS: dict[str, Kind] = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}


def kind_of(path: str | PurePath) -> Kind | None:
    """Return which key of an input a file belongs under, by its suffix in any case; None where it has none of them."""
    return _KINDS.get(PurePath(path).suffix.lower())
