"""Evaluating an embedder on one task, in modes: the corpus is embedded once, the queries once per mode.

    OUT/bundle.json                               whose scores the folder holds
    OUT/embeddings/TASK/                          finished parts, and the job they belong to
    OUT/MODE/{image,video,visdoc}/TASK_info.jsonl   the public files (github.com/TIGER-AI-Lab/VLM2Vec, eval.py)
                                  TASK_pred.jsonl
                                  TASK_score.json   written last: the task is done in that mode

The same job, run again, goes on after the last finished part, and embeds nothing for what is done. Once scores are
there, the `.npz` files may be deleted.

Axes: Q queries of a part, N candidates, D embedding size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmemb_benchmarks.mmeb_v2.data import Candidate, Key, Query, TaskData
from mmemb_benchmarks.mmeb_v2.metrics import Ranked, scores
from mmemb_benchmarks.mmeb_v2.tasks import Task
from mmemb_benchmarks.results import BundleFacts
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import InputError, check_known
from mmemb_deploy.files import claim, whole, write_whole
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.results import Detail
from mmemb_deploy.routing.router import Route

MODES = ("never", "always", "auto")  # in the order of the tables
CHUNK = 64  # inputs that are embedded and kept together; all their images are in memory at once
PREDICTIONS = 100  # names of a ranking that are written; the public scorer looks at 10

ROUTE_COLUMNS = ("route", "gate_score", "rationale", "rationale_tokens")  # that info lines hold beside the public ones

Columns = dict[str, NDArray[Any]]
Figures = dict[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """An embedder on one task. `out` is the folder of all tasks, `done` hears how many more inputs are embedded."""

    embedder: Embedder
    task: Task
    data: TaskData
    out: Path
    batch_size: int = 32
    done: Callable[[int], None] = lambda _: None

    def run(self, modes: Sequence[str]) -> dict[str, Figures]:
        """Return the figures by mode, from its score file where that is there.

        Raises InputError that names the query or candidate which cannot be embedded; OptionError for files that
        another bundle, or another reading of the data, left in `out`.
        """
        for mode in modes:
            check_known("mode", mode, MODES)
        bundle, data = BundleFacts.of(self.embedder), self.data
        claim(self.out, {"model": bundle.name, "manifest": bundle.hash}, name="bundle.json")
        claim(self.parts, {"data": data.fingerprint, "queries": len(data.queries), "frames": data.frames})
        scored = {mode: score_path(self.out, mode, self.task) for mode in modes}
        if not all(path.is_file() for path in scored.values()):
            documents = self._embedded("corpus", list(data.corpus.items()), self._embed_documents)
            corpus_ND = np.concatenate([part["embedding"] for _, part in documents])
            for mode, path in scored.items():
                if not path.is_file():
                    self._score(mode, corpus_ND, path)
        return {mode: read_score(path) for mode, path in scored.items()}

    def _score(self, mode: str, corpus_ND: Floats, target: Path) -> None:
        """Rank by cosine, of equals the first before, and write the three public files of a mode."""
        names = list(self.data.corpus)
        row_of = {name: row for row, name in enumerate(names)}
        ranked: list[Ranked] = []
        infos: list[dict[str, Any]] = []
        embed = self._embed_queries(mode)
        for queries, part in self._embedded(mode, self.data.queries, embed):
            for query, query_D in zip(queries, part["embedding"], strict=True):
                asked: Sequence[Key] = names if self.task.scope == "corpus" else query.candidates
                rows_ND = corpus_ND if asked is names else corpus_ND[[row_of[name] for name in asked]]
                best = np.argsort(-(rows_ND @ query_D), kind="stable")[:PREDICTIONS]
                ranked.append(Ranked([asked[index] for index in best], query.labels, query.grades))
            infos += _infos(queries, part)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(_beside(target, "_info.jsonl"), _lines(infos))
        write_whole(_beside(target, "_pred.jsonl"), _lines(query.as_json() for query in ranked))
        write_whole(target, json.dumps(scores(ranked) | self._counts(infos), indent=4) + "\n")

    @property
    def parts(self) -> Path:
        """Where finished embeddings lie."""
        return self.out / "embeddings" / self.task.name

    def _embedded(
        self, kind: str, items: Sequence[T], embed: Callable[[Sequence[T], int], Columns]
    ) -> Iterator[tuple[Sequence[T], Columns]]:
        """Yield the items part by part, each with what was embedded of it, now or by an earlier run."""
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            path = self.parts / f"{kind}-{start:09d}.npz"
            if not path.exists():
                with whole(path) as new, new.open("wb") as file:
                    np.savez(file, allow_pickle=False, **embed(chunk, start))
            self.done(len(chunk))
            with np.load(path, allow_pickle=False) as archive:
                yield chunk, {name: archive[name] for name in archive.files}

    def _embed_documents(self, items: Sequence[tuple[Key, Candidate]], _: int) -> Columns:
        embeddings_ND = np.empty((len(items), self.embedder.dim), np.float32)
        for instruction, indices in _by_instruction([candidate for _, candidate in items]):
            options: EncodeOptions = {"batch_size": self.batch_size}
            if instruction is not None:  # or the bundle's own instruction for documents holds
                options["instruction"] = instruction
            try:
                embeddings_ND[indices] = self.embedder.encode_document(
                    [items[index][1].content for index in indices], **options
                )
            except InputError as error:
                key = items[indices[error.index or 0]][0]
                raise InputError(f"{self.task.name}, candidate {key!r}: {error.message}") from error
        return {"embedding": embeddings_ND}

    def _embed_queries(self, mode: str) -> Callable[[Sequence[Query], int], Columns]:
        def embed(queries: Sequence[Query], start: int) -> Columns:
            embeddings_QD = np.empty((len(queries), self.embedder.dim), np.float32)
            details: dict[int, Detail] = {}
            for instruction, indices in _by_instruction(queries):
                try:
                    result = self.embedder.encode_detailed(
                        [queries[index].content for index in indices],
                        instruction=instruction,
                        reasoning=mode,
                        batch_size=self.batch_size,
                    )
                except InputError as error:
                    number = start + indices[error.index or 0]
                    raise InputError(f"{self.task.name}, query {number}: {error.message}") from error
                embeddings_QD[indices] = result.embeddings
                details |= {index: detail for index, detail in zip(indices, result.details, strict=True) if detail}
            ordered = [details[index] for index in range(len(queries))]
            return {
                "embedding": embeddings_QD,
                "route": np.array([detail.route.value for detail in ordered]),
                "gate_score": np.array([detail.gate_score for detail in ordered], np.float32),
                "rationale": np.array([detail.rationale or "" for detail in ordered]),
                "rationale_tokens": np.array([detail.rationale_tokens for detail in ordered], np.int64),
            }

        return embed

    def _counts(self, infos: Sequence[dict[str, Any]]) -> Figures:
        """Return what the score file says beside the public figures: numbers only, or public tools stumble."""
        row_scope = self.task.scope == "row"
        unanswerable = [
            query for query in self.data.queries if row_scope and not set(query.labels) & set(query.candidates)
        ]
        return {
            "num_pred": len(infos),
            "num_data": len(infos),
            "num_whole": self.data.whole,
            "num_unanswerable": len(unanswerable),
            "frames": self.data.frames,
            "reasoning_rate": sum(info["route"] == Route.REASON for info in infos) / len(infos),
            "rationale_tokens": sum(info["rationale_tokens"] for info in infos) / len(infos),
        }


def score_path(out: Path, mode: str, task: Task) -> Path:
    """Return where the public score file of a task lies."""
    return out / mode / task.group / f"{task.name}_score.json"


def read_score(path: Path) -> Figures:
    """Read a score file."""
    figures: Figures = json.loads(path.read_text())
    return figures


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name.removesuffix("_score.json") + ending)


def _infos(queries: Sequence[Query], part: Columns) -> Iterator[dict[str, Any]]:
    """Yield the public info of queries, and how each was embedded."""
    for index, query in enumerate(queries):
        route = {name: part[name][index].item() for name in ROUTE_COLUMNS}
        if np.isnan(route["gate_score"]):  # JSON has no such number
            route["gate_score"] = None
        yield query.as_info() | route


def _lines(objects: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


def _by_instruction(items: Sequence[Query | Candidate]) -> Iterable[tuple[str | None, list[int]]]:
    """Group items by what they are embedded for, since one call of `encode` embeds for one thing."""
    groups: dict[str | None, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.instruction, []).append(index)
    return groups.items()
