"""The pool as a job: resumable, safe from a kill, and losing nothing when a worker fails.

pool.json            what the pool is of: workers and a hash of the questions
part-00000.parquet   rationales: question, task, worker, sample, rationale; of process 3, part-00000-3.parquet
failures.jsonl       what failed in the last run; the next run tries it again; of process 3, failures-3.jsonl
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import claim
from mmemb_training.pool.workers import Worker
from mmemb_training.processes import ALONE, Processes
from mmemb_training.samples import Question
from mmemb_training.tables import locked, read_parts, write_part

if TYPE_CHECKING:
    from rich.console import Console

POOL, FAILURES, FAILURES_OF_ALL = "pool.json", "failures.jsonl", "failures*.jsonl"
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
    processes: Processes = ALONE,
    done: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Have every worker write for every question; return the report. The same call, run again, goes on.

    Several processes that call it share the questions, and return when all are done. `done` hears how many more
    questions a worker has finished. Raises OptionError if the folder's pool is of other questions or workers, or two
    questions share a key or two workers a name; what a worker raises passes through, after everything written before
    is kept.
    """
    keys = [question.key for question in questions]
    _check_distinct("questions have the key", keys)
    _check_distinct("workers have the name", [worker.name for worker in workers])
    with locked(folder, processes.index):
        if processes.main:
            hashed = hashlib.sha256("\n".join(keys).encode()).hexdigest()
            claim(folder, {"questions": hashed, "workers": {one.name: one.samples for one in workers}}, name=POOL)
            for path in folder.glob(FAILURES_OF_ALL):
                path.unlink()
        processes.wait()
        failures = folder / (FAILURES if processes.main else f"failures-{processes.index}.jsonl")
        failures.write_text("")
        own = processes.share(range(len(keys)))
        for worker in workers:
            rows = read_parts(folder, ("question", "worker"))
            present = {row["question"] for row in rows if row["worker"] == worker.name}
            waiting = [index for index in own if keys[index] not in present]
            done(len(own) - len(waiting))
            for start in range(0, len(waiting), batch):
                part = [questions[index] for index in waiting[start : start + batch]]
                _write(folder, worker, part, failures, processes.index)
                done(len(part))
        processes.wait()
        return pool_report(folder, workers, len(keys))


def read_pool(folder: Path, only: Container[str] | None = None) -> dict[str, list[Rationale]]:
    """Return the candidates of every question, or of those whose keys are in `only`, by worker and sample."""
    pool: dict[str, list[Rationale]] = defaultdict(list)
    for row in read_parts(folder, COLUMNS):
        if only is None or row["question"] in only:
            pool[row["question"]].append(Rationale(row["worker"], row["sample"], row["rationale"]))
    return {key: sorted(found, key=lambda one: (one.worker, one.sample)) for key, found in pool.items()}


def pool_report(folder: Path, workers: Sequence[Worker], questions: int) -> dict[str, Any]:
    """Return, by worker: questions written, failed and missing, candidates by task, and their length and emptiness."""
    counts = {worker.name: Counter[str]() for worker in workers}
    tasks = {worker.name: Counter[str]() for worker in workers}
    for row in read_parts(folder, COLUMNS):
        if row["worker"] in counts:
            text = row["rationale"]
            sizes = {"characters": len(text), "words": len(text.split()), "empty": not text.strip()}
            counts[row["worker"]].update({"candidates": 1, "questions": row["sample"] == 0} | sizes)
            tasks[row["worker"]][row["task"]] += 1
    for path in folder.glob(FAILURES_OF_ALL):
        for line in path.read_text().splitlines():
            counts[json.loads(line)["worker"]]["failed"] += 1
    return {
        name: {
            "questions": found["questions"],
            "failed": found["failed"],
            "missing": questions - found["questions"] - found["failed"],
            "candidates": found["candidates"],
            "tasks": dict(sorted(tasks[name].items())),
            "mean_characters": found["characters"] / max(1, found["candidates"]),
            "mean_words": found["words"] / max(1, found["candidates"]),
            "empty": found["empty"],
        }
        for name, found in counts.items()
    }


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print what `build_pool` returned as a table, one worker a line."""
    from rich.table import Table

    table = Table("worker", "questions", "failed", "missing", "candidates", "words", "empty", "by task")
    for name, of in report.items():
        tasks = ", ".join(f"{task} {count}" for task, count in of["tasks"].items())
        counts = (str(of[key]) for key in ("questions", "failed", "missing", "candidates"))
        table.add_row(name, *counts, f"{of['mean_words']:.1f}", f"{of['empty'] / max(1, of['candidates']):.1%}", tasks)
    console.print(table)


def _write(folder: Path, worker: Worker, questions: Sequence[Question], failures: Path, process: int) -> None:
    results = worker.write(questions)
    write_part(
        folder,
        [
            {"question": question.key, "task": question.task, "worker": worker.name, "sample": index, "rationale": text}
            for question, written in zip(questions, results, strict=True)
            for index, text in enumerate(written.rationales)
        ],
        process,
    )
    with failures.open("a") as file:
        for question, written in zip(questions, results, strict=True):
            if written.error is not None:
                failure = {"question": question.key, "worker": worker.name, "error": written.error}
                file.write(json.dumps(failure, ensure_ascii=False) + "\n")


def _check_distinct(what: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise OptionError(f"several {what} {twice[0]!r}: their candidates could not be told apart; rename all but one")
