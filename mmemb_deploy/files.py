"""Files that are whole or absent, whenever a process dies, and folders that hold one job's work alone."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import OptionError


@contextmanager
def whole(path: Path) -> Generator[Path]:
    """Yield a path beside `path` to write to; its file becomes `path` in one step when the block ends without error."""
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file, text as UTF-8, that is whole or absent."""
    with whole(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def claim(folder: Path, facts: Mapping[str, Any], *, name: str = "job.json", begun: bool | None = None) -> None:
    """Take a folder for one job, which is made if need be; the same job, called again, goes on.

    `facts` say in JSON what the job is, and lie in the folder's file `name`. `begun` says whether work lies there that
    another job must not touch; None takes the file's presence for it. Raises OptionError, naming the facts that differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    facts = json.loads(json.dumps(facts, default=str))
    known = _facts(path) if begun or (begun is None and path.exists()) else facts
    if known != facts:
        differing = [fact for fact in sorted({*known, *facts}) if known.get(fact) != facts.get(fact)]
        raise OptionError(
            f"{folder} holds the work of another job, with another {' and another '.join(differing)}: run that one "
            "again, or choose another folder"
        )
    write_whole(path, json.dumps(facts, indent=1) + "\n")


def _facts(path: Path) -> dict[str, Any]:
    """Return what a job's file says, nothing where it is missing or no JSON object."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
