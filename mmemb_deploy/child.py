"""Processes that this package starts of itself."""

from __future__ import annotations

import sys
from pathlib import Path


def calling(module: str, *arguments: object) -> str:
    """Return the code, for Python's -c, that calls a module's `main` and imports from where this process does."""
    path = [str(Path(folder).absolute()) for folder in sys.path]
    return f"import sys; sys.path[:] = {path!r}; from {module} import main; main({', '.join(map(repr, arguments))})"
