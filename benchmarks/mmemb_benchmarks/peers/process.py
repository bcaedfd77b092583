"""A peer's process, and the environment that it runs in.

There is an environment for each set of requirements, made once and used while that set is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmemb_benchmarks.peers import contenders
from mmemb_benchmarks.peers.contenders import Ids
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


class PeerProcess:
    """A contender in a process of its own. `calls` names what it can do. Raises PeerError where it fails."""

    def __init__(self, python: Path, contender: str, load: dict[str, Any]) -> None:
        """Start the process and load the weights."""
        self._name = contender
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.child = subprocess.Popen(
            [str(python), contenders.__file__, contender],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.calls: list[str] = self._ask(load)["calls"]

    def run(self, call: str, ids: Ids, tokens: int = 0) -> tuple[Any, float]:
        """Run one call; return what it found and the seconds it took, measured over there."""
        answer = self._ask({"call": call, "ids": ids, "tokens": tokens})
        return answer["found"], float(answer["seconds"])

    def close(self) -> None:
        """End the process, and wait until its memory is free."""
        assert self.child.stdin
        assert self.child.stdout
        with suppress(BrokenPipeError):  # of a request that it died too early to read
            self.child.stdin.close()
        self.child.wait()
        self.child.stdout.close()
        self._errors.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.child.stdin
        assert self.child.stdout
        with suppress(BrokenPipeError):  # then there is no answer, which says the same
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            status = self.child.wait()
            self._errors.seek(0)
            why = last_line(self._errors.read())
            if status == -signal.SIGKILL:  # which no process does to itself
                why = "it was killed, most likely for want of memory: name fewer peers"
            self.close()
            raise PeerError(why)
        return json.loads(line)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
