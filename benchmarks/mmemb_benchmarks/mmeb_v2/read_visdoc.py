"""The visual document tasks, in the BEIR layout: `queries`, `corpus` and `qrels`, each a configuration of its own.

Columns: `query-id`, `query`; `corpus-id`, `image`; `query-id`, `corpus-id`, `score`. Pages lie as PNG files in the
task's media folder. A page that is only inside the corpus' parquet files is written there first, as the public loader
does, so that the corpus never has to fit in memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from mmemb_benchmarks.mmeb_v2.annotations import rows_of
from mmemb_benchmarks.mmeb_v2.data import Candidate, Key, Query, TaskData
from mmemb_benchmarks.mmeb_v2.tasks import Task
from mmemb_deploy.errors import InputError
from mmemb_deploy.files import write_whole


def page_name(reader: str, key: Key) -> str:
    """Return the file name of a page.

    With ViDoRe's layout the page of `corpus-id` 7 is `7.png`; VisRAG's `corpus-id` is a file name, shortened on disk to
    50 characters and a hash.
    """
    if reader == "vidore":
        return f"{key}.png"
    path = PurePosixPath(str(key))
    digest = hashlib.md5(str(key).encode(), usedforsecurity=False).hexdigest()[:8]
    return f"{str(key).removesuffix(path.suffix)[:50]}_{digest}{path.suffix}"


def read_pages(task: Task, annotations: Path, media: Path) -> TaskData:
    """Read ViDoRe, ViDoSeek, MMLongBench and VisRAG."""
    keys: list[Key] = [row["corpus-id"] for row in rows_of(task, annotations, "corpus-id", subset="corpus")]
    pages = {key: media / page_name(task.reader, key) for key in keys}
    if not all(page.is_file() for page in pages.values()):
        _unpack(task, annotations, pages)
    grades: dict[Key, dict[Key, int]] = {}
    for row in rows_of(task, annotations, "query-id", "corpus-id", "score", subset="qrels"):
        if row["score"] > 0:
            graded = grades.setdefault(row["query-id"], {})
            graded[row["corpus-id"]] = max(row["score"], graded.get(row["corpus-id"], 0))
    queries: list[Query] = []
    for row in rows_of(task, annotations, "query-id", "query", subset="queries"):
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


def _unpack(task: Task, annotations: Path, pages: dict[Key, Path]) -> None:
    """Write the pages that are not there yet; raises InputError for one that the corpus does not hold either."""
    for row in rows_of(task, annotations, "corpus-id", "image", subset="corpus"):
        page = pages[row["corpus-id"]]
        if page.is_file():
            continue
        held = row["image"]
        encoded = held.get("bytes") if isinstance(held, dict) else None
        if not encoded:
            raise InputError(f"{page} is missing, and the corpus holds no image for it: unpack the pages there")
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page, encoded)
