"""Files that are whole or absent, whenever a process dies."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file, text as UTF-8, under a temporary name, then rename it into place."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    new.replace(path)
