"""The scores of a results folder, side by side: by task, by group, and over all 78 tasks.

A mean over fewer tasks than its group has is never shown as the group's: it says how many it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmemb_benchmarks.commands.shared import table
from mmemb_benchmarks.mmeb_v2.evaluate import Figures, read_score, score_path
from mmemb_benchmarks.mmeb_v2.metrics import CORRECTED
from mmemb_benchmarks.mmeb_v2.tasks import NDCG, SUBGROUPS, TASKS, Task

if TYPE_CHECKING:
    from rich.table import Table

NOTE = (
    "Scores in percent. Images and videos: Hit@1. Visual documents: linear NDCG@5, official (public scorer, hash seed "
    "0) / corrected (every page its own grade). In brackets: queries that reasoned. Means are unweighted over tasks."
)


@dataclass(frozen=True)
class Mean:
    """An unweighted mean over some of `of` tasks, with the official NDCG and with the corrected one."""

    official: float
    corrected: float
    reasoning_rate: float
    tasks: int
    of: int

    @classmethod
    def over(cls, tasks: Sequence[Task], figures: dict[str, Figures]) -> Mean | None:
        """Return the mean over those tasks that have figures; None where none has."""
        measured = [(task, figures[task.name]) for task in tasks if task.name in figures]
        if not measured:
            return None
        return cls(
            official=sum(held[task.metric] for task, held in measured) / len(measured),
            corrected=sum(held[corrected_name(task)] for task, held in measured) / len(measured),
            reasoning_rate=sum(held["reasoning_rate"] for _, held in measured) / len(measured),
            tasks=len(measured),
            of=len(tasks),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the mean, and whether it is over fewer tasks than it should be."""
        return {
            "score": round(self.official, 6),
            "corrected": round(self.corrected, 6),
            "reasoning_rate": round(self.reasoning_rate, 6),
            "tasks": self.tasks,
            "of": self.of,
            "partial": self.tasks < self.of,
        }


@dataclass(frozen=True)
class Results:
    """Figures by mode and task, as their score files hold them, of the tasks that are `measured`: in every mode.

    Those are the tasks that modes can be compared on, and that count as done.
    """

    measured: list[Task]
    figures: dict[str, dict[str, Figures]]

    @classmethod
    def of(cls, out: Path, modes: Sequence[str]) -> Results:
        """Read every score that lies in a results folder, of this run or of earlier ones."""
        measured = [task for task in TASKS.values() if all(score_path(out, mode, task).is_file() for mode in modes)]
        figures = {mode: {task.name: read_score(score_path(out, mode, task)) for task in measured} for mode in modes}
        return cls(measured, figures)

    @property
    def completeness(self) -> str:
        """Say "all 78 tasks" or "partial: n of 78", and where queries were left out, that it is a trial."""
        count = len(self.measured)
        tasks = f"all {count} tasks" if count == len(TASKS) else f"partial: {count} of {len(TASKS)}"
        held = (figures for by_task in self.figures.values() for figures in by_task.values())
        trial = any(figures["num_data"] < figures["num_whole"] for figures in held)
        return tasks + (", a trial on a part of their queries" if trial else "")

    def as_json(self) -> dict[str, Any]:
        """Return all figures, group means, and the tasks that are missing."""
        return {
            "completeness": self.completeness,
            "tasks": {
                task.name: {
                    "group": f"{task.group}/{task.subgroup}",
                    "metric": task.metric,
                    "modes": {mode: _figures(task, held[task.name]) for mode, held in self.figures.items()},
                }
                for task in self.measured
            },
            "means": {
                label: {mode: mean.as_json() for mode, held in self.figures.items() if (mean := Mean.over(tasks, held))}
                for label, tasks in groups()
            },
            "missing": [name for name, task in TASKS.items() if task not in self.measured],
        }

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the table's rows: group, task, frames, queries, and a cell per mode; means after their tasks."""
        for label, tasks in groups():
            if "/" in label:
                yield from self._task_rows(label, tasks)
            means = [Mean.over(tasks, held) for held in self.figures.values()]
            if any(means):
                count = next(mean.tasks for mean in means if mean)
                partial = "" if count == len(tasks) else f", partial: {count} of {len(tasks)}"
                yield label, f"mean{partial}", "", "", *(_mean_cell(mean, label) for mean in means)

    def _task_rows(self, label: str, tasks: Sequence[Task]) -> Iterator[tuple[str, ...]]:
        for task in tasks:
            if task not in self.measured:
                continue
            by_mode = [by_task[task.name] for by_task in self.figures.values()]
            held = by_mode[0]
            count, whole = int(held["num_data"]), int(held["num_whole"])
            queries = str(count) if count == whole else f"{count} of {whole}"
            cells = [
                _cell(figures[task.metric], figures[CORRECTED], figures["reasoning_rate"], both=task.metric == NDCG)
                for figures in by_mode
            ]
            yield label, task.name, str(int(held["frames"])) if task.frames else "-", queries, *cells

    def markdown(self) -> str:
        """Return the table in Markdown, the note under it."""
        head = ("group", "task", "frames", "queries", *self.figures)
        rule = ("---", "---", *["---:"] * (len(head) - 2))
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *self.rows())]
        return "\n".join([f"MMEB-V2, {self.completeness}", "", *lines, "", NOTE, ""])

    def rich(self) -> Table:
        """Return the table for a terminal."""
        title = f"MMEB-V2, {self.completeness}"
        shown = table(title, "group", "task", "frames", "queries", *self.figures, left=2, caption=NOTE)
        for row in self.rows():
            is_mean = row[1].startswith("mean")
            shown.add_row(*row, style="bold" if is_mean else None, end_section=is_mean)
        return shown


def _figures(task: Task, held: Figures) -> dict[str, float]:
    return {
        "score": held[task.metric],
        "corrected": held[corrected_name(task)],
        "reasoning_rate": held["reasoning_rate"],
        "rationale_tokens": held["rationale_tokens"],
        "frames": held["frames"],
        "queries": held["num_data"],
        "queries_in_data": held["num_whole"],
        "unanswerable": held["num_unanswerable"],
    }


def corrected_name(task: Task) -> str:
    """Return the figure of a task that no defect of the public scorer touches."""
    return CORRECTED if task.metric == NDCG else task.metric


def groups() -> Iterator[tuple[str, list[Task]]]:
    """Yield every sub-group, every group after its own, and all tasks last, with their tasks."""
    for group, parts in SUBGROUPS.items():
        inside = [task for task in TASKS.values() if task.group == group]
        for part in parts:
            yield f"{group}/{part}", [task for task in inside if task.subgroup == part]
        yield group, inside
    yield "all", list(TASKS.values())


def _mean_cell(mean: Mean | None, label: str) -> str:
    if mean is None:
        return "-"
    return _cell(mean.official, mean.corrected, mean.reasoning_rate, both=label == "all" or label.startswith("visdoc"))


def _cell(official: float, corrected: float, reasoning_rate: float, *, both: bool) -> str:
    score = f"{100 * official:.1f}" + (f" / {100 * corrected:.1f}" if both else "")
    return f"{score} ({reasoning_rate:.0%})"
