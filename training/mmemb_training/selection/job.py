"""Selection as a job: every candidate of a pool judged once, in parts that survive a kill, and a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmemb_deploy.files import claim, write_whole
from mmemb_training.pool.job import Candidate
from mmemb_training.recipes.settings import Margins
from mmemb_training.samples import Sample
from mmemb_training.selection.evaluators import Evaluator
from mmemb_training.selection.select import Judged, Strangers, judge, report
from mmemb_training.tables import locked, read_parts, write_part

COLUMNS = ("question", "task", "worker", "sample", "rationale", "gain", "content")
SELECTION, REPORT = "selection.json", "report.json"
CHUNK = 2048  # questions; the unit of work that is kept


def judge_pool(
    samples: Sequence[Sample],
    pool: Mapping[str, Sequence[Candidate]],
    evaluator: Evaluator,
    folder: Path,
    margins: Margins,
    *,
    other_rationales: int = 2,
    seed: int = 0,
    identity: Any = None,
    done: Callable[[int], None] = lambda _: None,
) -> list[Judged]:
    """Judge a pool into `folder` and write `report.json`; return every judged candidate. A later call goes on.

    `identity` says, in JSON, what the evaluator is. Raises OptionError if the folder was judged by another.
    """
    with locked(folder):
        facts = {"evaluator": identity, "other_rationales": other_rationales, "seed": seed}
        claim(folder, facts | {"against_negatives": margins.against_negatives}, name=SELECTION)
        present = {row["question"] for row in read_parts(folder, ("question",))}
        waiting = [sample for sample in samples if pool.get(sample.question.key) and sample.question.key not in present]
        done(len(samples) - len(waiting))
        for start in range(0, len(waiting), CHUNK):
            part = waiting[start : start + CHUNK]
            strangers = Strangers(samples, pool, other_rationales, (seed, len(present) + start))
            judged = judge(part, pool, evaluator, strangers, against_negatives=margins.against_negatives)
            write_part(folder, [_row(one) for one in judged])
            done(len(part))
        found = read_judged(folder)
        write_whole(folder / REPORT, json.dumps(report(found, margins), indent=1))
    return found


def read_judged(folder: Path) -> list[Judged]:
    """Return what a folder holds of judged candidates."""
    return [
        Judged(
            row["question"],
            row["task"],
            Candidate(row["worker"], row["sample"], row["rationale"]),
            row["gain"],
            row["content"],
        )
        for row in read_parts(folder, COLUMNS)
    ]


def _row(one: Judged) -> dict[str, Any]:
    return {
        "question": one.question,
        "task": one.task,
        **asdict(one.candidate),
        "gain": one.gain,
        "content": one.content,
    }
