"""The image tasks: one row holds a query and its candidates, of which the first is right.

Columns: `qry_inst`, `qry_text`, `qry_img_path`, and `tgt_text` (a list) where texts are found, or `tgt_inst`,
`tgt_text` and `tgt_img_path` (lists) where images are. Instructions carry a placeholder of the benchmark's first
version, which says nothing here: where images go is the prompt's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmemb_benchmarks.mmeb_v2.annotations import rows_of
from mmemb_benchmarks.mmeb_v2.data import Candidate, Key, Query, TaskData
from mmemb_benchmarks.mmeb_v2.tasks import Task
from mmemb_deploy.errors import InputError

_PLACEHOLDER = "<|image_1|>"
_QUERY = ("qry_inst", "qry_text")
_TARGET_IMAGES = ("tgt_inst", "tgt_text", "tgt_img_path")


def read_image_text(task: Task, annotations: Path, media: Path) -> TaskData:
    """Read image (and text) to text: classification, question answering, captions."""
    queries: list[Query] = []
    corpus: dict[Key, Candidate] = {}
    for row in rows_of(task, annotations, *_QUERY, "qry_img_path", "tgt_text"):
        texts = tuple(row["tgt_text"])
        for text in texts:
            corpus.setdefault(text, Candidate(content={"text": text}))
        queries.append(_query(row, media, texts))
    return TaskData.of(queries, corpus)


def read_images(task: Task, annotations: Path, media: Path, *, image_query: bool) -> TaskData:
    """Read text to image, with a caption where the data set has captions; or image and text to image or image region.

    The latter, with an `image_query`, are visual grounding and composed retrieval.
    """
    queries: list[Query] = []
    corpus: dict[Key, Candidate] = {}
    columns = (*_QUERY, *(("qry_img_path",) if image_query else ()), *_TARGET_IMAGES)
    for row in rows_of(task, annotations, *columns):
        paths, captions = row["tgt_img_path"], row["tgt_text"]
        if len(paths) != len(captions):
            raise InputError(f"{annotations}: a row has {len(paths)} tgt_img_path for {len(captions)} tgt_text")
        keys: list[Key] = []
        for path, caption in zip(paths, captions, strict=True):
            # RefCOCO-Matching wants several objects of one image, so there the caption is a part of the name.
            key = f"{path}:" + caption.strip('"') if image_query else path
            keys.append(key)
            if key not in corpus:
                content = {"image": str(media / path)} | ({"text": caption.strip()} if caption.strip() else {})
                corpus[key] = Candidate(content=content, instruction=_instruction(row["tgt_inst"]))
        queries.append(_query(row, media, tuple(keys)))
    return TaskData.of(queries, corpus)


def _query(row: dict[str, Any], media: Path, keys: tuple[Key, ...]) -> Query:
    content: dict[str, Any] = {"text": row["qry_text"]} if row["qry_text"].strip() else {}
    if "qry_img_path" in row:
        content["image"] = str(media / row["qry_img_path"])
    return Query(content=content, instruction=_instruction(row["qry_inst"]), candidates=keys, label=keys[0])


def _instruction(words: str) -> str | None:
    return words.replace(_PLACEHOLDER, "").strip() or None
