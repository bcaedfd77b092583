"""The memory of a job by its rows: short texts, embedded in fresh processes, with the bundle's engine or without one.

Without the engine a million rows take minutes: what stands in its place gives every row the same vector.
"""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.timing import run_fresh, timed
from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.inputs.rows import Row
from mmemb_deploy.jobs.job import Job
from mmemb_deploy.jobs.run import embed_source
from mmemb_deploy.jobs.source import read_source
from mmemb_deploy.routing.fast_path import FastPath, FastResult

PROGRAM = """
from pathlib import Path
from mmemb_benchmarks.measure.memory import embed_texts
load = {{"backend": {backend!r}, "threads": {threads}, "device": {device}}}
print(embed_texts(Path({bundle!r}), {rows}, {suffix!r}, has_engine={has_engine}, **load).model_dump_json())
"""


class Memory(BaseModel, frozen=True):
    """What a job of so many rows took: seconds of its stages, and the most memory that its process ever had."""

    rows: int
    has_engine: bool
    read_seconds: float
    embed_seconds: float
    before_bytes: int  # with the bundle loaded
    peak_bytes: int
    output_bytes: int


def measure_memory(
    bundle: Path,
    backend: str,
    threads: int | None,
    device: int,
    rows: Sequence[int],
    suffix: str,
    *,
    has_engine: bool,
    report: Callable[[str], None],
) -> list[Memory]:
    """Embed so many short texts in a process each, into a file of this suffix.

    Raises BundleError without a bundle, OptionError for a backend.
    """
    choose_backend(backend, Bundle.open(bundle), threads, device)
    found = []
    for count in rows:
        report(f"{count} rows")
        code = PROGRAM.format(
            bundle=str(bundle),
            rows=count,
            suffix=suffix,
            has_engine=has_engine,
            backend=backend,
            threads=threads,
            device=device,
        )
        found.append(Memory.model_validate(run_fresh(code)))
    return found


def embed_texts(bundle: Path, rows: int, suffix: str, *, has_engine: bool, **load: Any) -> Memory:
    """Embed short texts in this process, which is to end then; `load` is what `Embedder.load` takes."""
    embedder = Embedder.load(bundle, **load)
    if not has_engine:
        embedder.paths = replace(embedder.paths, fast_path=OneVector(embedder.dim))
    embedder.encode(["a text"], reasoning="never")
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "inputs.jsonl"), Path(folder, f"vectors{suffix}")
        with path.open("w") as file:
            for row in range(rows):
                file.write(json.dumps({"id": f"row {row}", "text": f"{row} plus three"}) + "\n")
        source, read_seconds = timed(read_source, path)
        job = Job(source, output, {"reasoning": "never"}, document=False, keep_going=False)
        _, embed_seconds = timed(embed_source, embedder, job, lambda _: None)
        return Memory(
            rows=rows,
            has_engine=has_engine,
            read_seconds=read_seconds,
            embed_seconds=embed_seconds,
            before_bytes=before,
            peak_bytes=_peak(),
            output_bytes=output.stat().st_size,
        )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class OneVector(FastPath):
    """A fast path that computes nothing, and gives every row one vector of `dim` values."""

    def __init__(self, dim: int) -> None:
        self._vector_D = np.full(dim, dim**-0.5, np.float32)

    def fits(self, *_: Any, **__: Any) -> bool:
        """Return True."""
        return True

    def run(self, rows: Sequence[Row], **_: Any) -> FastResult:
        """Return the vector for every row, and no score."""
        return FastResult(np.tile(self._vector_D, (len(rows), 1)), np.full(len(rows), np.nan, np.float32), None)
