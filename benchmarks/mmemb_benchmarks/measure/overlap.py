"""How much of a job's time the engine waits for photos to be decoded, by three ways to prepare them.

Nothing ahead: a chunk is prepared, then embedded. A chunk ahead: one thread prepares the next chunk meanwhile. Rows
ahead: what `mmemb embed` does. All three embed the same files, in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel

from mmemb_benchmarks.timing import Spent
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.jobs.job import Job
from mmemb_deploy.jobs.run import embed_source, prepare
from mmemb_deploy.jobs.source import read_source
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.preparer import Prepared

OCTAVES = 9  # of a photo's structure, each twice as fine and half as strong as the one before
QUALITY = 90  # of its JPEG


class Way(BaseModel, frozen=True):
    """What one way to prepare photos came to, over all rounds."""

    rows_per_s: float
    idle_share: float  # of the time, in which no graph ran
    seconds: float  # of the job, in the mean


class OverlapResult(BaseModel, frozen=True):
    """A job's photos and the ways in which they were prepared."""

    photos: int
    megapixels: float
    mean_bytes: float
    rounds: int
    ways: dict[str, Way]


def write_photos(folder: Path, photos: int, size: tuple[int, int], seed: int) -> None:
    """Write JPEGs of (width, height) that differ: cut-outs of one picture that is coarse and fine as photos are."""
    rng = np.random.default_rng(seed)
    width, height = size
    picture = np.full((height, width, 3), 128, np.float32)
    for octave in range(OCTAVES):
        coarse = rng.normal(0, 2.0 ** (6 - octave), (2 + 3 * 2**octave, 2 + 4 * 2**octave, 3)).astype(np.float32)
        bands = [Image.fromarray(band).resize(size, Image.Resampling.BICUBIC) for band in coarse.transpose(2, 0, 1)]
        picture += np.stack([np.asarray(band) for band in bands], axis=-1)
    pixels = (picture + rng.normal(0, 2, picture.shape).astype(np.float32)).clip(0, 255).astype(np.uint8)
    for number in range(photos):
        shift = int(rng.integers(height)), int(rng.integers(width))
        Image.fromarray(np.roll(pixels, shift, (0, 1))).save(folder / f"{number:06d}.jpg", quality=QUALITY)


def measure_overlap(
    embedder: Embedder,
    spent: Spent,
    photos: Path,
    options: EncodeOptions,
    *,
    prepare_threads: int | None,
    rounds: int,
    report: Callable[[str], None],
) -> OverlapResult:
    """Embed a folder of photos in each way; `spent` is what the embedder's engine adds its seconds to.

    A few photos warm up the engine first.
    """
    source = read_source(photos, limits=embedder.manifest.limits)
    numbers = count()

    def job() -> Job:
        output = photos.with_name(f"vectors-{next(numbers)}.npz")
        return Job(source, output, options, document=True, keep_going=False)

    def nothing_ahead() -> None:
        for start in source.starts:
            embedder.run(_chunk(embedder, job_of_all, start))

    def a_chunk_ahead() -> None:
        for prepared in _ahead(embedder, job_of_all):
            embedder.run(prepared)

    def rows_ahead() -> None:
        embed_source(embedder, job(), lambda _: None, prepare_threads=prepare_threads)

    job_of_all = job()
    first = next(source.records())
    embedder.run(prepare(embedder, job_of_all, [first] * 4, 0))
    ways = {"nothing ahead": nothing_ahead, "a chunk ahead": a_chunk_ahead, "rows ahead": rows_ahead}
    seconds, busy = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for number in range(rounds):
        for name, way in ways.items():
            report(f"round {number + 1} of {rounds}: {name}")
            spent.clear()
            began = time.perf_counter()
            way()
            seconds[name] += time.perf_counter() - began
            busy[name] += sum(spent.values())
    files = sorted(photos.iterdir())
    with Image.open(files[0]) as image:
        megapixels = image.width * image.height / 1e6
    return OverlapResult(
        photos=source.rows,
        megapixels=megapixels,
        mean_bytes=sum(file.stat().st_size for file in files) / len(files),
        rounds=rounds,
        ways={
            name: Way(
                rows_per_s=rounds * source.rows / seconds[name],
                idle_share=1 - busy[name] / seconds[name],
                seconds=seconds[name] / rounds,
            )
            for name in ways
        },
    )


def _chunk(embedder: Embedder, job: Job, start: int) -> Prepared:
    return prepare(embedder, job, [record for _, _, record in job.source.chunks([start])], start)


def _ahead(embedder: Embedder, job: Job) -> Iterator[Prepared]:
    """Yield chunks, each prepared by one thread while the one before it runs."""
    starts = job.source.starts
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(_chunk, embedder, job, starts[0])
        for later in [*starts[1:], None]:
            prepared = following.result()
            if later is not None:
                following = executor.submit(_chunk, embedder, job, later)
            yield prepared
