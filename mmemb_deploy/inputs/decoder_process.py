"""The process in which files are decoded: reads tasks from standard input, and answers on standard output.

A task is a line of JSON, and the bytes of the file where it comes as such. An answer is a line of JSON, and the pixels
of its pictures, one after another. Nothing is pickled. An alarm ends the process where a task takes longer than it may,
whatever a decoder does; more memory than it may have is not given to it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.preprocess import VisionSpec
from mmemb_deploy.inputs.sampling import Sampling

if TYPE_CHECKING:
    from mmemb_deploy.inputs.preprocess import Pixels

MEMORY = 2 * 2**30  # bytes of address space, beside those of a file that comes as bytes


def main() -> None:
    """Answer tasks until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what an interrupt ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while line := sys.stdin.buffer.readline():
        task = json.loads(line)
        if not _answer(task, sys.stdin.buffer.read(task["bytes"]), answers):
            break


def _answer(task: dict[str, Any], data: bytes, answers: BinaryIO) -> bool:
    """Do a task, write its answer, and return whether this process can go on."""
    limits = Limits(**task["limits"])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY + len(data)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    signal.setitimer(signal.ITIMER_REAL, max(limits.max_media_seconds, 1e-3))  # 0 would be no alarm
    pictures: list[Pixels] = []
    sound = True
    try:
        facts, pictures = _done(task, data if task["path"] is None else task["path"], limits)
    except InputError as error:
        facts = {"error": error.message}
    except MemoryError:
        sound = False
        facts = {"error": f"needs more than {MEMORY // 2**30} GiB of memory to decode; pass a smaller one"}
    signal.setitimer(signal.ITIMER_REAL, 0)
    facts |= {"sound": sound, "shapes": [picture.shape[:2] for picture in pictures]}
    answers.write(json.dumps(facts).encode() + b"\n")
    answers.writelines(picture.tobytes() for picture in pictures)
    answers.flush()
    return sound


def _done(task: dict[str, Any], source: str | bytes, limits: Limits) -> tuple[dict[str, Any], list[Pixels]]:
    """Do a task; its library is imported with the first that needs it."""
    match task["task"]:
        case "frames":
            from mmemb_deploy.inputs import video

            frames, times = video.read_frames(
                source, Sampling(**task["sampling"]), limits, VisionSpec(**task["vision"])
            )
            return {"times": times}, frames
        case "duration":
            from mmemb_deploy.inputs import video

            return {"seconds": video.duration(source)}, []
        case "pages":
            from mmemb_deploy.inputs import pdf

            vision = VisionSpec(**task["vision"])
            pages, numbers = pdf.render_pages(source, task["numbers"], task["most"], limits, vision)
            return {"numbers": numbers}, pages
        case "page count":
            from mmemb_deploy.inputs import pdf

            return {"pages": pdf.page_count(source, limits)}, []
        case other:
            raise AssertionError(other)
