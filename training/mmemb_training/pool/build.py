"""The pool as a job: resumable, safe from a kill, and losing nothing when a worker fails.

pool.json            what the pool is of: workers and a hash of the questions
part-00000.parquet   rationales: question, task, worker, sample, rationale
failures.jsonl       what failed in the last run; the next run tries it again
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import claim
from mmemb_training.pool.workers import Worker
from mmemb_training.samples import Question
from mmemb_training.tables import locked, read_parts, write_part

if TYPE_CHECKING:
    from rich.console import Console

POOL, FAILURES = "pool.json", "failures.jsonl"
COLUMNS = ("question", "task", "worker", "sample", "rationale")


@dataclass(frozen=True)
class Rationale:
    """What was written, by whom, and which of the worker's for its question it is."""

    worker: str
    sample: int
    text: str


def build_pool(
    questions: Sequence[Question],
    workers: Sequence[Worker],
    folder: Path,
    *,
    batch: int = 256,
    done: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Have every worker write for every question; return the report. The same call, run again, goes on.

    `done` hears how many more questions a worker has finished. Raises OptionError if the folder's pool is of other
    questions or workers, or two questions share a key or two workers a name; what a worker raises passes through,
    after everything written before is kept.
    """
    _check_distinct("questions have the key", [question.key for question in questions])
    _check_distinct("workers have the name", [worker.name for worker in workers])
    with locked(folder):
        keys = "\n".join(question.key for question in questions)
        hashed, counts = hashlib.sha256(keys.encode()).hexdigest(), {worker.name: worker.samples for worker in workers}
        claim(folder, {"questions": hashed, "workers": counts}, name=POOL)
        present = {(row["question"], row["worker"]) for row in read_parts(folder, COLUMNS)}
        (folder / FAILURES).write_text("")
        for worker in workers:
            waiting = [question for question in questions if (question.key, worker.name) not in present]
            done(len(questions) - len(waiting))
            for start in range(0, len(waiting), batch):
                part = waiting[start : start + batch]
                _write(folder, worker, part)
                done(len(part))
        return pool_report(folder, workers, questions)


def read_pool(folder: Path) -> dict[str, list[Rationale]]:
    """Return the candidates of every question, by worker and sample."""
    pool: dict[str, list[Rationale]] = defaultdict(list)
    for row in read_parts(folder, COLUMNS):
        pool[row["question"]].append(Rationale(row["worker"], row["sample"], row["rationale"]))
    return {key: sorted(found, key=lambda one: (one.worker, one.sample)) for key, found in pool.items()}


def pool_report(folder: Path, workers: Sequence[Worker], questions: Sequence[Question]) -> dict[str, Any]:
    """Return, by worker: questions written, failed and missing, candidates by task, and their length and emptiness."""
    rows = list(read_parts(folder, COLUMNS))
    failures = [json.loads(line) for line in (folder / FAILURES).read_text().splitlines()]
    report = {}
    for worker in workers:
        own = [row for row in rows if row["worker"] == worker.name]
        written = len({row["question"] for row in own})
        failed = sum(failure["worker"] == worker.name for failure in failures)
        report[worker.name] = {
            "questions": written,
            "failed": failed,
            "missing": len(questions) - written - failed,
            "candidates": len(own),
            "tasks": dict(sorted(Counter(row["task"] for row in own).items())),
            "mean_characters": sum(len(row["rationale"]) for row in own) / max(1, len(own)),
            "mean_words": sum(len(row["rationale"].split()) for row in own) / max(1, len(own)),
            "empty": sum(not row["rationale"].strip() for row in own),
        }
    return report


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print what `build_pool` returned as a table, one worker a line."""
    from rich.table import Table

    table = Table("worker", "questions", "failed", "missing", "candidates", "words", "empty", "by task")
    for name, of in report.items():
        tasks = ", ".join(f"{task} {count}" for task, count in of["tasks"].items())
        counts = (str(of[key]) for key in ("questions", "failed", "missing", "candidates"))
        table.add_row(name, *counts, f"{of['mean_words']:.1f}", f"{of['empty'] / max(1, of['candidates']):.1%}", tasks)
    console.print(table)


def _write(folder: Path, worker: Worker, questions: Sequence[Question]) -> None:
    results = worker.write(questions)
    write_part(
        folder,
        [
            {"question": question.key, "task": question.task, "worker": worker.name, "sample": index, "rationale": text}
            for question, written in zip(questions, results, strict=True)
            for index, text in enumerate(written.rationales)
        ],
    )
    with (folder / FAILURES).open("a") as file:
        for question, written in zip(questions, results, strict=True):
            if written.error is not None:
                failure = {"question": question.key, "worker": worker.name, "error": written.error}
                file.write(json.dumps(failure, ensure_ascii=False) + "\n")


def _check_distinct(what: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise OptionError(f"several {what} {twice[0]!r}: their candidates could not be told apart; rename all but one")
