"""Files are decoded by processes of their own: what hangs, crashes or takes all memory ends there."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.decoder import DECODERS
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.parse import parse

HOSTILE = Path(__file__).parents[1] / "hostile_media.py"


def pdf(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), (grey,) * 3).save(buffer, "PDF")
    return buffer.getvalue()


def video(size: tuple[int, int], frames: int = 5) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream: Any = output.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 20 * number % 256, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def grey(content: bytes) -> int:
    """Return what a PDF shows."""
    return int(np.median(np.asarray(parse({"document": content}).images[0])))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    DECODERS.close()
    yield
    DECODERS.close()


def test_one_process_reads_file_after_file() -> None:
    assert grey(pdf(50)) == 50
    (first,) = DECODERS.pids()
    assert grey(pdf(90)) == 90
    parse({"video": video((64, 32))})
    with pytest.raises(InputError):
        parse({"video": b"broken"})
    assert DECODERS.pids() == [first]


def test_what_takes_too_long_is_ended_and_the_next_file_is_read() -> None:
    content = video((640, 480), 100)
    parse({"document": pdf(50)})
    with pytest.raises(
        InputError, match=r"^'video' takes longer than max_media_seconds = 0\.001 to decode; pass a short"
    ):
        parse({"video": content}, Limits(max_media_seconds=0.001))
    assert DECODERS.pids() == []
    assert grey(pdf(70)) == 70


def test_what_needs_too_much_memory_is_refused_and_the_next_file_is_read() -> None:
    assert grey(pdf(50)) == 50
    (pid,) = DECODERS.pids()
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    left = used + 40 * 2**20  # as if it had used the rest
    resource.prlimit(pid, resource.RLIMIT_AS, (left, left))
    with pytest.raises(InputError, match=r"^'video' (needs more than 2 GiB of memory|cannot be decoded)"):
        parse({"video": video((4000, 3000), 2)})
    assert DECODERS.pids() != [pid]
    assert grey(pdf(70)) == 70


def test_a_crash_is_refused_with_its_signal_and_the_next_file_is_read() -> None:
    parse({"document": pdf(50)})
    (pid,) = DECODERS.pids()

    def until(state: str) -> None:
        while Path(f"/proc/{pid}/stat").read_text().split()[2] != state:
            time.sleep(0.001)

    def crash() -> None:
        until("R")
        os.kill(pid, signal.SIGSEGV)

    until("S")
    thread = threading.Thread(target=crash)
    thread.start()
    with pytest.raises(InputError, match=r"^'video' cannot be decoded: the decoder's process ended on it by SIGSEGV"):
        parse({"video": video((1920, 1080), 20)})
    thread.join()
    assert grey(pdf(70)) == 70


def test_a_process_that_ended_while_it_had_no_task_is_replaced() -> None:
    parse({"document": pdf(50)})
    (pid,) = DECODERS.pids()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert grey(pdf(70)) == 70


def test_threads_read_at_the_same_time_each_its_own_file() -> None:
    found: dict[int, list[int]] = {}

    def read(shade: int) -> None:
        found[shade] = [grey(pdf(shade)) for _ in range(5)]

    threads = [threading.Thread(target=read, args=(shade,)) for shade in (30, 60, 90, 120)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {shade: [shade] * 5 for shade in (30, 60, 90, 120)}
    assert 1 <= len(DECODERS.pids()) <= 4


SCRIPT = """
import io, os, signal, sys
from PIL import Image
from mmemb_deploy.inputs.decoder import DECODERS
from mmemb_deploy.inputs.parse import parse
buffer = io.BytesIO()
Image.new("RGB", (60, 40)).save(buffer, "PDF")
assert parse({"document": buffer.getvalue()}).pages == (1,)
(pid,) = DECODERS.pids()
"""
FORK = """
forked = os.fork()
assert parse({"document": buffer.getvalue()}).pages == (1,)
assert (DECODERS.pids() == [pid]) == (forked != 0)
if forked:
    _, status = os.waitpid(forked, 0)
    assert status == 0
    assert parse({"document": buffer.getvalue()}).pages == (1,)
    assert DECODERS.pids() == [pid]
    print(pid)
"""


@pytest.mark.parametrize("end", ["print(pid)", "print(pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)", FORK])
def test_no_process_is_left_behind(end: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT + end], capture_output=True, text=True, env=environment, check=False
    )
    assert (run.stderr, run.returncode in (0, -signal.SIGKILL)) == ("", True)
    pid = int(run.stdout)
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and b"decoder_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < until, "the decoder goes on without its caller"
        time.sleep(0.01)


def test_hostile_files_end_as_an_input_error_or_are_read() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(HOSTILE), "--files", "60"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
