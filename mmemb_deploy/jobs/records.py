"""The rows that one thing of a source becomes: itself, each page of a document, or each clip of a video."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import InputError, OptionError
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.media import duration, page_count

REST = 0.1  # of a clip's length; a shorter rest of a video belongs to the clip before it


@dataclass(frozen=True)
class Record:
    """A row of a job: where it comes from, and what `encode` reads."""

    id: str
    file: str  # the one that it comes from, relative to the source where it lies inside; "" where there is none
    input: Any  # of `encode`; a Path is a text that is read when its turn comes
    page: int = 0  # of a document, from 1; 0 where there is none
    second: float = math.nan  # at which a clip begins, NaN where there is none
    failure: InputError | None = None  # why there is nothing to embed

    @property
    def is_text(self) -> bool:
        """Whether there is no file to decode."""
        return isinstance(self.input, str | Path) or self.input.keys() == {"text"}

    def content(self, limits: Limits) -> Any:
        """Return what `Embedder.prepare` reads: an input, or the error that stands for one that cannot be read."""
        if self.failure is not None:
            return self.failure
        return _text(self.input, limits) if isinstance(self.input, Path) else self.input


@dataclass(frozen=True)
class Division:
    """How documents and videos become rows. Raises OptionError for a clip that does not last."""

    whole_documents: bool = False
    """Whether a document is one row, not one for each page."""

    clip_seconds: float | None = None
    """Seconds of a row of a video; None makes it one row."""

    def __post_init__(self) -> None:
        if self.clip_seconds is not None and not 0 < self.clip_seconds < math.inf:
            raise OptionError(f"clip_seconds is {self.clip_seconds}: a clip lasts some seconds, more than 0")

    def records(self, whole: Record, limits: Limits) -> Iterator[Record]:
        """Yield the rows of what a source holds; where its file cannot be opened, one that says why."""
        parts = whole.input if isinstance(whole.input, dict) else {}
        try:
            if "document" in parts and "pages" not in parts and not self.whole_documents:
                divided = _pages(whole, page_count(parts["document"], limits))
            elif self.clip_seconds is not None and _divisible(parts):
                divided = _clips(whole, self.clip_seconds, duration(parts["video"], limits))
            else:
                divided = iter([whole])
        except InputError as failure:
            divided = iter([_at(whole, failure=failure)])
        yield from divided


UNDIVIDED = Division()


def _pages(whole: Record, count: int) -> Iterator[Record]:
    for page in range(1, count + 1):
        yield _at(whole, f"#page={page}", page=page, pages=[page])


def _divisible(parts: dict[str, Any]) -> bool:
    """Whether a video lies in a file that is not yet cut."""
    return isinstance(parts.get("video"), str | Path | bytes) and not {"start", "end"} & parts.keys()


def _clips(whole: Record, length: float, total: float) -> Iterator[Record]:
    count = max(1, math.ceil(total / length - REST))
    for clip in range(count):
        start, end = clip * length, total if clip == count - 1 else (clip + 1) * length
        yield _at(whole, f"#t={_seconds(start)},{_seconds(end)}", second=start, start=start, end=end)


def _at(
    whole: Record,
    mark: str = "",
    *,
    page: int = 0,
    second: float = math.nan,
    failure: InputError | None = None,
    **parts: Any,
) -> Record:
    return Record(whole.id + mark, whole.file, whole.input | parts, page, second, failure)


def _seconds(time: float) -> str:
    """Return a time as a media fragment has it, to the millisecond."""
    return f"{time:.3f}".rstrip("0").rstrip(".")


def _text(path: Path, limits: Limits) -> str | InputError:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(limits.max_text_chars + 1)
    except (OSError, UnicodeDecodeError) as error:
        return InputError(f"{path} cannot be read as a text in UTF-8 ({error}); mend it, or move it away")
    if len(text) > limits.max_text_chars:
        return InputError(
            f"{path} has more characters than max_text_chars = {limits.max_text_chars}; shorten or split it"
        )
    return text
