"""Environments of peers: one for each set of requirements, made once and used while that set is the same."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mmemb_deploy.errors import MmembError

COMPLETE = "complete"  # a file that is there once everything is installed


class PeerError(MmembError):
    """A peer could not be installed, loaded or run."""


def default_folder() -> Path:
    """Return where environments are kept: under the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mmemb-deploy" / "peers"


def install(folder: Path, requirements: Sequence[str]) -> None:
    """Make a virtual environment with these packages. Raises PeerError with pip's last line."""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, *requirements]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerError(f"installing {', '.join(requirements)} failed: {last_line(done.stderr)}")


def interpreter(
    requirements: Sequence[str], folder: Path, make: Callable[[Path, Sequence[str]], None] = install
) -> Path:
    """Return the Python of the environment that holds these requirements, made where it is not there whole."""
    key = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    target = folder / key
    if not (target / COMPLETE).is_file():
        if target.exists():
            shutil.rmtree(target)
        folder.mkdir(parents=True, exist_ok=True)
        make(target, requirements)
        (target / COMPLETE).write_text("\n".join(requirements) + "\n")
    return target / "bin" / "python"


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
