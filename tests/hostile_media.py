"""A sweep of hostile files: PDFs and videos that are mutated at random, and what `parse` makes of each.

    python tests/hostile_media.py --files 10000 --seed 0

Reports how many ended how, whatever was no InputError, the longest time, and the memory of this process and of the
decoder's over time. File number N of a seed is always the same one; `--only N` keeps it and shows what it does. Exits
with 1 where anything but an InputError came out, here or in the decoder, or a file took longer than its limit and the
start of a process.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.decoder import DECODERS
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import QWEN3_VL

SECONDS = 10.0
SLOW_SHARE = 0.001  # of files that must be ended by the clock
START = 5.0  # seconds that a process may take to start on a busy machine
LIMITS = Limits(max_media_seconds=SECONDS, max_frames=16, max_images=8)
VISION = replace(QWEN3_VL, max_pixels=256 * 32 * 32, video_max_pixels=2048 * 32 * 32)
VIDEOS = (
    ("mp4", "libx264", "yuv420p"),
    ("mov", "mpeg4", "yuv420p"),
    ("matroska", "libx264", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("webm", "libvpx", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "mjpeg", "yuvj420p"),
    ("mpegts", "libx264", "yuv420p"),
    ("mpeg", "mpeg2video", "yuv420p"),
    ("flv", "flv", "yuv420p"),
    ("asf", "wmv2", "yuv420p"),
    ("mp4", "libx265", "yuv420p"),
    ("mp4", "libsvtav1", "yuv420p"),
)
NUMBERS = (b"0", b"-1", b"1", b"65536", b"2147483647", b"-2147483648", b"4294967295", b"9" * 30, b"1e308")
FIELDS = (b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00", b"\x00\x00\x00\x01")


def video(container: str, codec: str, pixels: str) -> bytes:
    """Return a video of two seconds with moving shapes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream: Any = output.add_stream(codec, rate=25, options=quiet)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 64, pixels, 10
        for number in range(50):
            image = Image.new("RGB", (96, 64), (5 * number, 80, 255 - 5 * number))
            ImageDraw.Draw(image).ellipse((number, 10, number + 30, 50), fill="white")
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def scans(pages: int) -> bytes:
    """Return a PDF whose pages are photographs."""
    noise = np.random.default_rng(0).integers(0, 255, (pages, 20, 16, 3), np.uint8)
    images = [Image.fromarray(page).resize((320, 400)) for page in noise]
    buffer = io.BytesIO()
    images[0].save(buffer, "PDF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


SLOW = " 0 0 m 600 700 l 300 10 50 700 600 20 c S" * 200_000  # strokes, which take minutes


def drawing(extra: str = "") -> bytes:
    """Return a PDF of text, lines, a pattern, a form within a form, and a field that is filled in."""
    content = (
        "BT /F1 24 Tf 72 700 Td (Invoice 31415) Tj ET 1 0 0 RG 3 w 72 680 m 400 680 l S "
        "/Pattern cs /P1 scn 72 400 200 200 re f q 0.5 0 0 0.5 100 100 cm /X1 Do Q" + extra
    )
    objects = [
        "<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [8 0 R] /DA (/F1 12 Tf 0 g) >> >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Annots [8 0 R] /Resources << "
        "/Font << /F1 5 0 R >> /Pattern << /P1 6 0 R >> /XObject << /X1 7 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        "<< /Type /Pattern /PatternType 1 /PaintType 1 /TilingType 1 /BBox [0 0 10 10] /XStep 10 /YStep 10 "
        "/Resources << >> /Length 29 >>\nstream\n0 0 1 rg 0 0 5 5 re f 1 0 0 rg\nendstream",
        "<< /Type /XObject /Subtype /Form /BBox [0 0 600 600] /Resources << /XObject << /X1 7 0 R >> >> /Length 27 >>"
        "\nstream\n0 1 0 rg 0 0 300 300 re f  \nendstream",
        "<< /Type /Annot /Subtype /Widget /FT /Tx /T (total) /V (2718) /Rect [300 600 500 640] /P 3 0 R >>",
    ]
    body, places = "%PDF-1.7\n", list[int]()
    for number, each in enumerate(objects, start=1):
        places.append(len(body))
        body += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    body += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    body += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{body.index('xref')}\n%%EOF\n"
    return body.encode("latin-1")


def whole_files() -> list[tuple[str, bytes]]:
    """Return the files that are mutated, each with the key of an input that reads it."""
    found = [("document", scans(3)), ("document", drawing()), ("document", drawing(" q" * 2000 + " /X1 Do" * 50))]
    for container, codec, pixels in VIDEOS:
        if codec in av.codecs_available:
            found.append(("video", video(container, codec, pixels)))
    return found


def mutated(draw: random.Random, key: str, whole: bytes, others: list[bytes]) -> bytes:
    """Return a file with one to four kinds of damage."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, len(data)))
        length = draw.choice((1, 4, 16, 256, 4096))
        kind = draw.choice(("flip", "flips", "cut", "remove", "repeat", "zero", "field", "number", "splice"))
        if kind == "flip" and data:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == "flips":
            for _ in range(draw.choice((8, 64, 512))):
                if data:
                    data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == "cut":
            del data[place:]
        elif kind == "remove":
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = data[place : place + length] * draw.choice((1, 2, 100))
        elif kind == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == "field":
            data[place : place + 4] = draw.choice(FIELDS)
        elif kind == "number" and key == "document":
            numbers = list(re.finditer(rb"\d+", bytes(data)))
            if numbers:
                number = draw.choice(numbers)
                data[number.start() : number.end()] = draw.choice(NUMBERS)
        elif kind == "splice":
            other = draw.choice(others)
            data[place:] = other[draw.randrange(len(other)) :]
    return bytes(data[: 4 * 2**20])


def memory(pid: int) -> tuple[int, int]:
    """Return the resident MiB of a process, now and at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    now, most = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))  # type: ignore[index]
    return now // 1024, most // 1024


def outcome(message: str) -> str:
    """Return what kind of refusal a message is: without names and numbers."""
    return re.sub(r"\d[\d.]*", "N", re.sub(r"\('[^']*'\) ", "", message))[:90]


def main() -> int:
    """Run a sweep, print what it found, and return the exit code."""
    parser = argparse.ArgumentParser(description="Mutate PDFs and videos, and parse each.")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one file, which is kept in the working folder")
    options = parser.parse_args()
    os.environ["SVT_LOG"] = "1"  # of an encoder: errors alone
    files = whole_files()
    outcomes, escaped, late = Counter[str](), list[str](), list[str]()
    longest, slowest, processes = 0.0, 0, set[int]()
    numbers = range(options.files) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            draw = random.Random(f"{options.seed} {number}")
            key, whole = draw.choice(files)
            data = mutated(draw, key, whole, [each for _, each in files])
            if draw.random() < SLOW_SHARE:
                key, data = "document", drawing(SLOW)
            path = Path(folder) / f"file.{key}"
            path.write_bytes(data)
            if options.only is not None:
                Path(f"hostile-{options.seed}-{number}.{key}").write_bytes(data)
            given: Any = path if draw.random() < 0.7 else data
            began = time.perf_counter()
            try:
                parse({key: given}, LIMITS, VISION)
                how = "read"
            except InputError as error:
                how = outcome(error.message)
                if "ended on it with status" in error.message:  # an exception that the decoder's process does not know
                    escaped.append(f"file {number}: {error.message}")
                if options.only is not None:
                    print(error.message)
            except Exception:  # noqa: BLE001 - what the sweep looks for
                how = "ESCAPED"
                escaped.append(f"file {number}: {traceback.format_exc()}")
            seconds = time.perf_counter() - began
            outcomes[f"{key}: {how}"] += 1
            if seconds > longest:
                longest, slowest = seconds, number
            if seconds > SECONDS + START:
                late.append(f"file {number}: {seconds:.1f} s")
            processes.update(DECODERS.pids())
            if number % max(1, options.files // 20) == 0:
                ours, theirs = memory(os.getpid()), [memory(pid) for pid in DECODERS.pids()]
                print(f"{number:>8} files, MiB now and at most: this process {ours}, decoder {theirs}", flush=True)
    for how, count in outcomes.most_common():
        print(f"{count:>8}  {how}")
    print(*escaped, *late, sep="\n")
    facts = {
        "files": len(numbers),
        "seed": options.seed,
        "read": sum(count for how, count in outcomes.items() if how.endswith(": read")),
        "refused": sum(count for how, count in outcomes.items() if not how.endswith((": read", "ESCAPED"))),
        "escaped": len(escaped),
        "late": len(late),
        "longest_s": round(longest, 2),
        "slowest_file": slowest,
        "decoder_processes": len(processes),
        "peak_mib": memory(os.getpid())[1],
    }
    print(json.dumps(facts))
    return 1 if escaped or late else 0


if __name__ == "__main__":
    sys.exit(main())
