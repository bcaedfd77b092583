"""The other end of a contender's process."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmemb_benchmarks.peers import contenders
from mmemb_benchmarks.peers.environments import PeerError, last_line

Ids = list[list[int]]


class Worker:
    """A contender in a process of its own. `calls` names what it can do. Raises PeerError where it fails."""

    def __init__(self, python: Path, contender: str, load: dict[str, Any]) -> None:
        """Start the process and load the weights."""
        self._name = contender
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
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
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):  # of a request that it died too early to read
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self._errors.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):  # then there is no answer, which says the same
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self._errors.seek(0)
            why = last_line(self._errors.read())
            if status == -signal.SIGKILL:  # which no process does to itself
                why = "it was killed, most likely for want of memory: name fewer peers"
            self.close()
            raise PeerError(why)
        return json.loads(line)
