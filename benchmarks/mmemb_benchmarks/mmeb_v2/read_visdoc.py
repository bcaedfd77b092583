"""The visual document tasks, in the BEIR layout: `queries`, `corpus` and `qrels`, each a configuration of its own.

Columns: `query-id`, `query`; `corpus-id`, `image`; `query-id`, `corpus-id`, `score`. Pages lie as PNG files in the
task's media folder. A page that is only inside the corpus' parquet files is written there first, as the public loader
does, so that the corpus never has to fit in memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from mmemb_benchmarks.mmeb_v2.annotations import annotation_files, rows
from mmemb_benchmarks.mmeb_v2.data import Candidate, Key, Query, TaskData
from mmemb_benchmarks.mmeb_v2.tasks import Task
from mmemb_deploy.errors import InputError


def read_vidore(task: Task, annotations: Path, media: Path) -> TaskData:
    """Read ViDoRe, ViDoSeek and MMLongBench: the page of `corpus-id` 7 is `7.png`."""
    return _read(task, annotations, media)


def read_visrag(task: Task, annotations: Path, media: Path) -> TaskData:
    """Read VisRAG: a `corpus-id` is a file name, shortened on disk to 50 characters and a hash."""
    return _read(task, annotations, media)


def page_name(reader: str, key: Key) -> str:
    """Return the file name of a page."""
    if reader == "vidore":
        return f"{key}.png"
    path = PurePosixPath(str(key))
    digest = hashlib.md5(str(key).encode(), usedforsecurity=False).hexdigest()[:8]
    return f"{str(key).removesuffix(path.suffix)[:50]}_{digest}{path.suffix}"


def _read(task: Task, annotations: Path, media: Path) -> TaskData:
    corpus_files = annotation_files(annotations, "corpus", task.split)
    keys: list[Key] = [row["corpus-id"] for row in rows(corpus_files, ("corpus-id",))]
    pages = {key: media / page_name(task.reader, key) for key in keys}
    if not all(page.is_file() for page in pages.values()):
        _unpack(corpus_files, pages)
    grades: dict[Key, dict[Key, int]] = {}
    for row in rows(annotation_files(annotations, "qrels", task.split), ("query-id", "corpus-id", "score")):
        if row["score"] > 0:
            graded = grades.setdefault(row["query-id"], {})
            graded[row["corpus-id"]] = max(row["score"], graded.get(row["corpus-id"], 0))
    queries: list[Query] = []
    for row in rows(annotation_files(annotations, "queries", task.split), ("query-id", "query")):
        relevant = grades.get(row["query-id"])
        if relevant is None:
            raise InputError(f"{annotations}: no qrels say which page answers query {row['query-id']!r}")
        unknown = [key for key in relevant if key not in pages]
        if unknown:
            raise InputError(
                f"{annotations}: qrels of query {row['query-id']!r} name page {unknown[0]!r}, not in corpus"
            )
        queries.append(
            Query(
                content={"text": row["query"]},
                instruction=task.instruction,
                candidates=tuple(relevant),
                label=tuple(relevant),
                grades=tuple(relevant.values()),
            )
        )
    return TaskData.of(
        queries,
        {
            key: Candidate(content={"image": str(page)}, instruction=task.target_instruction)
            for key, page in pages.items()
        },
    )


def _unpack(corpus_files: list[Path], pages: dict[Key, Path]) -> None:
    """Write the pages that are not there yet; raises InputError for one that the corpus does not hold either."""
    for row in rows(corpus_files, ("corpus-id", "image")):
        page = pages[row["corpus-id"]]
        if page.is_file():
            continue
        held = row["image"]
        encoded = held.get("bytes") if isinstance(held, dict) else None
        if not encoded:
            raise InputError(f"{page} is missing, and the corpus holds no image for it: unpack the pages there")
        page.parent.mkdir(parents=True, exist_ok=True)
        fresh = page.with_name(f".{page.name}.new")
        fresh.write_bytes(encoded)
        fresh.replace(page)
