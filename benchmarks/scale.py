"""What a million pairs take of a machine: rows a second and memory by rows, of samples, mining, and the judge.

Everything is drawn: samples in the layout of MMEB-train, photographs, vectors in clusters, a model of random weights.
Each figure is of a process of its own. Run it with

    python benchmarks/scale.py --rows 10000 --rows 100000 --rows 250000 --checkpoint CHECKPOINT --out RESULT.json
"""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer

from mmemb_benchmarks.results import stamp, write
from mmemb_benchmarks.timing import run_fresh, timed

PROGRAM = """
import json, sys
sys.path.insert(0, {here!r})
import scale
print(json.dumps(scale.{name}(**{options!r})))
"""
STEPS, BATCH = 50, 1024  # that are drawn of the samples
WIDTH, CLUSTERS, NOISE = 256, 2000, 0.6  # of the vectors
QUERIES, HARD = 1000, 8
PHOTOGRAPH = 1600, 1200
PROMPT, RATIONALE = 600, 40  # tokens


def samples(rows: int, *, mapped: bool) -> dict[str, Any]:
    """Write samples to a table and draw steps of it; without `mapped`, of a list of all of them instead."""
    from mmemb_training.data.table import SampleTable, write_samples
    from mmemb_training.task_batches import TaskBatches

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "samples.arrow")
        _, written = timed(write_samples, _drawn_samples(rows), file)
        before = _own_bytes()
        table = SampleTable([file])
        held = table if mapped else list(table)
        batches = TaskBatches(table.task_N, min(BATCH, rows // 64), 0)
        _, drawn = timed(lambda: [held[place].question.key for step in range(STEPS) for place in batches(step)])
        return {
            "rows": rows,
            "mapped": mapped,
            "file_bytes": file.stat().st_size,
            "own_bytes": _own_bytes() - before,
            "written_per_second": rows / written,
            "drawn_per_second": STEPS * min(BATCH, rows // 64) / drawn,
        }


def photographs(images: int, *, threads: int) -> dict[str, Any]:
    """Decode and resize photographs as a step does."""
    import os

    from PIL import Image

    from mmemb_deploy.inputs.parse import parse
    from mmemb_deploy.inputs.preprocess import QWEN3_VL, resize_image
    from mmemb_training import ahead

    os.environ["LOCAL_WORLD_SIZE"] = str(max(1, (os.cpu_count() or 1) // threads))
    with tempfile.TemporaryDirectory() as folder:
        rng, path = np.random.default_rng(0), Path(folder, "photograph.jpeg")
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        coarse.resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(path, quality=90)
        began = resource.getrusage(resource.RUSAGE_SELF)
        read = lambda _: resize_image(parse({"image": str(path)}).images[0], QWEN3_VL)  # noqa: E731
        _, seconds = timed(ahead.in_threads, read, range(images))
        ended = resource.getrusage(resource.RUSAGE_SELF)
        busy = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
        return {"images": images, "threads": threads, "per_second": images / seconds, "per_core_second": images / busy}


def targets(rows: int) -> dict[str, Any]:
    """Index the targets of samples and of their negatives, without their embeddings."""
    from mmemb_training.data.table import SampleTable, write_samples
    from mmemb_training.selection import bank as module

    bank: Any = module
    bank.embed_rows = lambda *_: np.zeros((1, 1), np.float32)  # of the checkpoint, nothing is read
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "samples.arrow")
        write_samples(_drawn_samples(rows), file)
        table, before = SampleTable([file]), _own_bytes()
        found, seconds = timed(bank.TargetBank, table, SimpleNamespace(rows=None))
        return {
            "rows": rows,
            "targets": len(found.targets),
            "targets_per_second": len(found.targets) / seconds,
            "own_bytes": _own_bytes() - before,
        }


def mining(rows: int) -> dict[str, Any]:
    """Find the nearest of clustered vectors by the index that mining takes, and by comparing all."""
    from mmemb_training.selection.mining import EXACT_UP_TO, nearest_of

    with tempfile.TemporaryDirectory() as folder:
        vectors_ND = np.lib.format.open_memmap(
            Path(folder, "targets.npy"), mode="w+", dtype=np.float32, shape=(rows, WIDTH)
        )
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((CLUSTERS, WIDTH), np.float32)
        for start in range(0, rows, 10_000):
            block = vectors_ND[start : start + 10_000]
            block[:] = centres[rng.integers(CLUSTERS, size=len(block))]
            block += NOISE * rng.standard_normal(block.shape, np.float32)
            block /= np.linalg.norm(block, axis=1, keepdims=True)
        queries_QD = vectors_ND[:: rows // QUERIES][:QUERIES] + 0.02 * rng.standard_normal((QUERIES, WIDTH), np.float32)
        (exact, _), before = nearest_of(vectors_ND, exact_up_to=rows), _own_bytes()
        (found, _), built = timed(nearest_of, vectors_ND)
        (_, found_QK), searched = timed(found, queries_QD, 4 * (HARD + 1))
        own = _own_bytes() - before
        (_, exact_QK), compared = timed(exact, queries_QD, HARD)
        shared = [len(set(near[:HARD]) & set(all_of)) for near, all_of in zip(found_QK, exact_QK, strict=True)]
        return {
            "rows": rows,
            "width": WIDTH,
            "listed": rows > EXACT_UP_TO,
            "built_seconds": built,
            "queries_per_second": QUERIES / searched,
            "queries_per_second_comparing_all": QUERIES / compared,
            "recall": float(np.mean(shared)) / HARD,
            "own_bytes": own,
        }


def judging(checkpoint: str, rationales: int, *, bounded: bool) -> dict[str, Any]:
    """Read rationales after one prompt, in passes of bounded size or all at once."""
    import torch

    from mmemb_training import encoder as module
    from mmemb_training.checkpoint import load_checkpoint
    from mmemb_training.encoder import Encoder
    from mmemb_training.samples import Question, query_row

    loaded = load_checkpoint(Path(checkpoint), dtype="bfloat16")
    encoder = Encoder(loaded).eval()
    module.CONTEXT_TOKENS = 8 * (PROMPT + RATIONALE) if bounded else 2**40  # a bound that bites at this size
    row = query_row(Question(key="", task="", content="a b c d e f " * (PROMPT // 12)), loaded.rows)
    with torch.inference_mode():
        encoder.next_logits([row], [(0, [5] * RATIONALE)], [1, 2])
        before = _peak()
        encoder.next_logits([row], [(0, [5] * RATIONALE)] * rationales, [1, 2])
    return {"rationales": rationales, "bounded": bounded, "prompt": row.length, "more_bytes": _peak() - before}


def _drawn_samples(rows: int) -> Iterator[Any]:
    from mmemb_training.samples import Question, Sample, Target

    for row in range(rows):
        task = f"mmeb/task {row % 20}"
        image, words = f"MMEB-train/images/task/{row}.jpg", f"an answer of some words, number {row}"
        yield Sample(
            question=Question(
                key=f"{task}/{row}",
                task=task,
                content={"text": f"what is shown at {row}, and where is it?", "image": image},
                instruction="Represent the given image with the following question:",
            ),
            wanted=words,
            target=Target(content={"text": words}, labels=frozenset({words})),
            negatives=(Target(content={"text": f"not {words}"}, labels=frozenset({f"not {words}"})),),
        )


def _own_bytes() -> int:
    """Return the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    rows: Annotated[list[int], typer.Option(help="Samples, and targets to mine from; repeat.")],
    out: Annotated[Path, typer.Option(help="Where the result goes, as JSON.")],
    checkpoint: Annotated[Path | None, typer.Option(help="A model to judge by, as of `mmemb train random`.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Photographs to decode.")] = 64,
) -> None:
    """Measure, and write one JSON file."""

    def run(name: str, **options: Any) -> Any:
        found = run_fresh(PROGRAM.format(here=str(Path(__file__).parent), name=name, options=options))
        print(json.dumps({"of": name} | found), flush=True)
        return found

    result = {
        "samples": [run("samples", rows=count, mapped=mapped) for count in rows for mapped in (True, False)],
        "photographs": [run("photographs", images=images, threads=threads) for threads in (1, 2)],
        "targets": [run("targets", rows=count) for count in rows],
        "mining": [run("mining", rows=count) for count in rows],
        "judging": [
            run("judging", checkpoint=str(checkpoint), rationales=count, bounded=bounded)
            for count in ((16, 64) if checkpoint else ())
            for bounded in (True, False)
        ],
    }
    write(stamp("scale", result, None), out)


if __name__ == "__main__":
    typer.run(main)
