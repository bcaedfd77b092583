"""Questions about document pages: the train sets of ColPali (arXiv 2407.01449) and VisRAG (arXiv 2410.10594).

    FOLDER/data/train-00000-of-00082.parquet      query: string; image: struct of bytes and path; and columns not read
    FOLDER/pages/                                 written here: every page once, named by the hash of its bytes

Both are read as retrieval of the page by the question, which is what their models and the visual document tasks of
MMEB-V2 do; the instructions are those tasks' own. Pages are written out as they are met, so that a sample holds a path
and not half a megabyte, and can be read again in any order: `pages` needs as much disk as the parquet files. A page is
equal to another with the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmemb_deploy.errors import OptionError
from mmemb_training.data.files import data_files, how_to_get, parquet_rows
from mmemb_training.samples import Question, Sample, Target

REPOSITORIES = {
    "colpali": "vidore/colpali_train_set",
    "visrag-in-domain": "openbmb/VisRAG-Ret-Train-In-domain-data",
    "visrag-synthetic": "openbmb/VisRAG-Ret-Train-Synthetic-data",
}
QUERY_INSTRUCTION = "Find a document image that matches the given query:"
PAGE_INSTRUCTION = "Understand the content of the provided document image."


def read_pages(name: str, folder: Path) -> Iterator[Sample]:
    """Read one of REPOSITORIES; a page without a question is left out.

    Raises OptionError for files that are missing, with the command that brings them, and a row without a page.
    """
    fix = how_to_get(REPOSITORIES[name], folder)
    files = data_files(folder / "data", "train-*.parquet", fix)
    for number, row in enumerate(parquet_rows(files, ("query", "image"))):
        text = (row["query"] or "").strip()
        if not text:
            continue
        encoded = (row["image"] or {}).get("bytes")
        if not encoded:
            raise OptionError(f"{files[0].parent}: row {number} holds no image; get the files again with: {fix}")
        page = _unpacked(encoded, folder / "pages")
        yield Sample(
            question=Question(key=f"{name}/{number}", task=name, content={"text": text}, instruction=QUERY_INSTRUCTION),
            wanted=page.name,
            target=Target(content={"image": str(page)}, labels=frozenset({page.name}), instruction=PAGE_INSTRUCTION),
        )


def _unpacked(encoded: bytes, folder: Path) -> Path:
    """Return the file of a page, written unless it is there; processes may do it at the same time."""
    page = folder / hashlib.sha256(encoded).hexdigest()[:32]
    if not page.is_file():
        folder.mkdir(exist_ok=True)
        fresh = folder / f".{page.name}.{os.getpid()}"
        fresh.write_bytes(encoded)
        fresh.replace(page)
    return page
