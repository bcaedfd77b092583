"""What every reader returns: queries, and the candidates they rank, keyed by name as the benchmark keys them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import InputError

Key = str | int  # a candidate's name; that of a text is the text, that of a page its id, which some sets number


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to be found; `content` is an input of `Embedder.encode`, with paths for images and frames."""

    content: dict[str, Any]
    instruction: str | None = None  # None takes the bundle's for documents


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked, and which candidates answer it."""

    content: dict[str, Any]
    instruction: str | None
    candidates: tuple[Key, ...]
    """Those of its row, in its order; where the whole corpus is ranked, only those that answer it."""

    label: Key | tuple[Key, ...]
    """The right candidate; several where the public files list several."""

    grades: tuple[int, ...] | None = None
    """How relevant each label is, in the order of the labels; None where all count the same."""

    info: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else the public info files say of the query."""

    @property
    def labels(self) -> tuple[Key, ...]:
        """The right candidates."""
        return self.label if isinstance(self.label, tuple) else (self.label,)

    def as_info(self) -> dict[str, Any]:
        """Return the query's line of the public info file."""
        label = list(self.label) if isinstance(self.label, tuple) else self.label
        line: dict[str, Any] = {"cand_names": list(self.candidates), "label_name": label}
        if self.grades is not None:
            line["rel_scores"] = list(self.grades)
        return line | self.info


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task, read. `whole` counts its queries before any were left out."""

    queries: tuple[Query, ...]
    corpus: dict[Key, Candidate]
    whole: int

    @classmethod
    def of(cls, queries: list[Query], corpus: dict[Key, Candidate]) -> TaskData:
        """Keep all queries."""
        return cls(queries=tuple(queries), corpus=corpus, whole=len(queries))

    def first(self, count: int, *, row_scope: bool) -> TaskData:
        """Return the leading queries. A corpus that is ranked whole stays whole, or the task would become easier."""
        queries = self.queries[:count]
        corpus = self.corpus
        if row_scope:
            corpus = {key: corpus[key] for query in queries for key in query.candidates}
        return replace(self, queries=queries, corpus=corpus)

    @property
    def contents(self) -> Iterator[dict[str, Any]]:
        """Everything that is embedded: queries, then candidates."""
        yield from (query.content for query in self.queries)
        yield from (candidate.content for candidate in self.corpus.values())

    @property
    def frames(self) -> int:
        """Frames of the longest video, as they were found; 0 without a video."""
        return max((len(content.get("video", ())) for content in self.contents), default=0)

    @property
    def fingerprint(self) -> str:
        """A hash of all that is embedded and of what answers what; paths count, the files' bytes do not."""
        digest = hashlib.sha256()
        for query in self.queries:
            digest.update(json.dumps([query.content, query.instruction, query.as_info()]).encode())
        for key, candidate in self.corpus.items():
            digest.update(json.dumps([key, candidate.content, candidate.instruction]).encode())
        return digest.hexdigest()

    def check_media(self) -> None:
        """Raise InputError, naming the first, if an image is missing: better now than after hours of embedding."""
        paths = dict.fromkeys(content["image"] for content in self.contents if "image" in content)
        missing = [path for path in paths if not Path(path).is_file()]
        if missing:
            raise InputError(
                f"{missing[0]} is missing, and {len(missing) - 1} more of {len(paths)} images: "
                "unpack the benchmark's media under the data root"
            )
