"""Selection as a job: every rationale of a pool assessed once, in parts that survive a kill, and a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmemb_deploy.files import claim, write_whole
from mmemb_training.pool.build import Rationale
from mmemb_training.processes import ALONE, Processes
from mmemb_training.recipes.settings import Margins
from mmemb_training.samples import Sample
from mmemb_training.selection.evaluators import Evaluator
from mmemb_training.selection.select import Assessed, report
from mmemb_training.tables import locked, read_parts, write_part

COLUMNS = ("question", "task", "worker", "sample", "rationale", "gain", "content", "found")
SELECTION, REPORT = "selection.json", "report.json"
CHUNK = 2048  # questions; the unit of work that is kept
BATCH = 64  # questions that the evaluator reads at once

Pool = Mapping[str, Sequence[Rationale]]  # by a question's key


def assess_pool(
    samples: Sequence[Sample],
    pool: Pool,
    evaluator: Evaluator,
    folder: Path,
    margins: Margins,
    *,
    other_rationales: int = 2,
    seed: int = 0,
    identity: Any = None,
    processes: Processes = ALONE,
    done: Callable[[int], None] = lambda _: None,
) -> Iterator[Assessed]:
    """Assess a pool into `folder` and write `report.json`; yield every assessed rationale. A later call goes on.

    Several processes that call it share the samples, and return when all are done. `identity` says, in JSON, what the
    evaluator is. Raises OptionError if the folder was assessed by another.
    """
    with locked(folder, processes.index):
        if processes.main:
            facts = {"evaluator": identity, "other_rationales": other_rationales, "seed": seed}
            claim(folder, facts | {"against_negatives": margins.against_negatives}, name=SELECTION)
        processes.wait()
        present = {row["question"] for row in read_parts(folder, ("question",))}
        others = OtherRationales(samples, pool, other_rationales, seed)
        own = processes.share(samples)
        waiting = [
            index
            for index, key in enumerate(sample.question.key for sample in own)
            if pool.get(key) and key not in present
        ]
        done(len(own) - len(waiting))
        for start in range(0, len(waiting), CHUNK):
            part = [own[index] for index in waiting[start : start + CHUNK]]
            others.begin((seed, len(present) + start, *([] if processes.main else [processes.index])))
            found = assess(part, pool, evaluator, others, against_negatives=margins.against_negatives)
            write_part(folder, [_row(one) for one in found], processes.index)
            done(len(part))
        processes.wait()
        if processes.main:
            write_whole(folder / REPORT, json.dumps(report(read_assessed(folder), margins), indent=1))
    return read_assessed(folder)


def read_assessed(folder: Path) -> Iterator[Assessed]:
    """Yield what a folder holds of assessed rationales."""
    for row in read_parts(folder, COLUMNS):
        own = Rationale(row["worker"], row["sample"], row["rationale"])
        yield Assessed(row["question"], row["task"], own, row["gain"], row["content"], row["found"])


def _row(one: Assessed) -> dict[str, Any]:
    own = one.rationale
    return asdict(one) | {"worker": own.worker, "sample": own.sample, "rationale": own.text}


def assess(
    samples: Sequence[Sample],
    pool: Pool,
    evaluator: Evaluator,
    other_rationales: OtherRationales,
    *,
    against_negatives: bool = False,
) -> Iterator[Assessed]:
    """Assess every rationale of the samples; equal texts of a question are read once."""
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        own = [pool.get(sample.question.key, ()) for sample in part]
        others = [
            {worker: other_rationales.draw(sample, worker) for worker in dict.fromkeys(one.worker for one in found)}
            for sample, found in zip(part, own, strict=True)
        ]
        asked = [
            list(dict.fromkeys([*(one.text for one in found), *(text for texts in drawn.values() for text in texts)]))
            for found, drawn in zip(own, others, strict=True)
        ]
        confidences = evaluator.confidences(part, asked)
        for sample, found, drawn, texts, confidence in zip(part, own, others, asked, confidences, strict=True):
            l_of = dict(zip(texts, confidence.with_each, strict=True))
            aside = dict(zip(texts, confidence.gain_on_negatives or [0.0] * len(texts), strict=True))
            for one in found:
                other_l = [l_of[text] for text in drawn[one.worker]]
                yield Assessed(
                    sample.question.key,
                    sample.question.task,
                    one,
                    gain=l_of[one.text] - confidence.without - (aside[one.text] if against_negatives else 0),
                    content=l_of[one.text] - float(np.mean(other_l)) if other_l else 0.0,
                    found=confidence.found,
                )


class OtherRationales:
    """Draws, for a question, up to `count` rationales that a worker wrote for others of its task."""

    def __init__(self, samples: Sequence[Sample], pool: Pool, count: int, seed: int | Sequence[int]) -> None:
        self._count = count
        self._rng = np.random.default_rng(seed)
        self._known: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for sample in samples:
            for one in pool.get(sample.question.key, ()):
                known = self._known.setdefault((sample.question.task, one.worker), [])
                known.append((sample.question.key, one.text))

    def begin(self, seed: int | Sequence[int]) -> None:
        """Draw from now on as `seed` says."""
        self._rng = np.random.default_rng(seed)

    def draw(self, sample: Sample, worker: str) -> list[str]:
        """Return what the worker wrote for some others."""
        known = self._known[sample.question.task, worker]
        drawn = [known[index] for index in self._rng.integers(len(known), size=2 * self._count)]
        return [text for question, text in drawn if question != sample.question.key][: self._count]
