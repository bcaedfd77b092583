"""Processes that decode files for this one, so that no file can hang or end it.

One is started with the first file, another where threads decode at the same time, and each is kept for the next file.
One that ends on a file, by its alarm, a crash, or for want of memory, is replaced with the next file.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from mmemb_deploy.child import calling
from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.preprocess import Pixels

ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}  # address space that it would not use


class Decoder:
    """One process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", calling("mmemb_deploy.inputs.decoder_process")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ENVIRONMENT,
        )

    @property
    def alive(self) -> bool:
        """Whether it can take a task."""
        return self.process.poll() is None

    def ask(self, task: Mapping[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], list[Pixels]]:
        """Have a task done. Raises InputError where the process ends on it, or says what is wrong with the file."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.write(data)
            self.process.stdin.flush()
            facts = json.loads(_line(self.process.stdout))
            pictures = [_picture(self.process.stdout, height, width) for height, width in facts["shapes"]]
        except (BrokenPipeError, EOFError) as error:
            raise InputError(_end(self.process.wait(), limits)) from error
        return facts, pictures

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                _close(pipe)


class Decoders:
    """The processes of this one that have no task, and where threads get theirs."""

    def __init__(self) -> None:
        self._idle: list[Decoder] = []
        self._lock = threading.Lock()

    def ask(
        self, source: str | bytes, limits: Limits, task: str, **details: Any
    ) -> tuple[dict[str, Any], list[Pixels]]:
        """Return what a task finds of a file, its path or bytes, and the pictures, uint8 (H, W, 3).

        Raises InputError, whose message goes on after the file's name, for whatever is wrong with the file.
        """
        data = source if isinstance(source, bytes) else b""
        path = source if isinstance(source, str) else None
        asked = {"task": task, "path": path, "bytes": len(data), "limits": asdict(limits)} | details
        decoder = self._taken()
        sound = False
        try:
            facts, pictures = decoder.ask(asked, data, limits)
            sound = facts["sound"]
        finally:
            self._give(decoder) if sound else decoder.close()
        if "error" in facts:
            raise InputError(facts["error"])
        return facts, pictures

    def pids(self) -> list[int]:
        """Return the ids of the processes that have no task."""
        with self._lock:
            return [decoder.process.pid for decoder in self._idle]

    def close(self) -> None:
        """End the processes that have no task."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def forget(self) -> None:
        """Leave the processes to the one that this one was forked from."""
        for decoder in self._idle:
            decoder.process.returncode = 0  # they are not this one's to wait for
            for pipe in (decoder.process.stdin, decoder.process.stdout):
                if pipe is not None:
                    _close(pipe)
        self._idle, self._lock = [], threading.Lock()

    def _taken(self) -> Decoder:
        with self._lock:
            while self._idle:
                decoder = self._idle.pop()
                if decoder.alive:
                    return decoder
                decoder.close()
        return Decoder()

    def _give(self, decoder: Decoder) -> None:
        with self._lock:
            self._idle.append(decoder)


def _line(pipe: IO[bytes]) -> bytes:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line


def _picture(pipe: IO[bytes], height: int, width: int) -> Pixels:
    content = pipe.read(height * width * 3)
    if len(content) < height * width * 3:
        raise EOFError
    return np.frombuffer(content, np.uint8).reshape(height, width, 3)


def _end(status: int, limits: Limits) -> str:
    if status == -signal.SIGALRM:
        return (
            f"takes longer than max_media_seconds = {limits.max_media_seconds:g} to decode; pass a shorter or smaller "
            "one, or a part of it"
        )
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"cannot be decoded: the decoder's process ended on it {how}; pass a whole one"


def _close(pipe: Any) -> None:
    with suppress(BrokenPipeError):  # of a task that the process did not read
        pipe.close()


DECODERS = Decoders()
atexit.register(DECODERS.close)
os.register_at_fork(after_in_child=DECODERS.forget)
