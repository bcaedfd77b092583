"""Embedding a file or a folder of inputs, in chunks that survive an interruption.

Finished chunks lie in `OUTPUT.parts/` until all are there; then they become OUTPUT in one rename. The same job, run
again, goes on after the last finished chunk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.embedder import Embedder, Prepared
from mmemb_deploy.errors import BackendError, InputError, MissingExtraError, OptionError
from mmemb_deploy.files import claim, whole
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.results import EncodeResult

if TYPE_CHECKING:
    from mmemb_deploy.reasoners.remote import RemoteReasoner

CHUNK = 256  # inputs; the unit of work that is kept
COLUMNS = (
    "id",
    "embedding",
    "route",
    "gate_score",
    "rationale",
    "rationale_source",
    "rationale_tokens",
    "truncated",
    "fallback",
    "error",
)
FORMATS = (".npz", ".parquet")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")

Columns = dict[str, NDArray[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """The inputs of a job: their ids, what `encode` reads, and a fingerprint of both."""

    ids: list[str]
    inputs: list[Any]
    fingerprint: str


@dataclass(frozen=True)
class Summary:
    """What a job did: rows, failed rows, rows that reasoned, their rationales' tokens, rows that fell back."""

    rows: int
    failures: int
    reasoned: int
    rationale_tokens: int
    fallbacks: int  # rows that a reasoner failed on and that got their direct embedding


def read_source(path: Path) -> Source:
    """Read JSON lines, each a string or an object of an input's parts and an optional "id", or a folder of files.

    Paths inside JSON lines are relative to their file. Of a folder, images and `.txt` files count, by name. Raises
    OptionError for a path that is neither, a malformed line, and a source without inputs.
    """
    if path.is_dir():
        ids, inputs = _read_folder(path)
    elif path.is_file():
        ids, inputs = _read_lines(path)
    else:
        raise OptionError(f"{path} does not exist: pass a file of JSON lines or a folder")
    if not ids:
        raise OptionError(f"{path} holds no inputs: expected JSON lines, or a folder with images or .txt files")
    listing = json.dumps([ids, inputs], default=str)
    return Source(ids, inputs, hashlib.sha256(listing.encode()).hexdigest())


def _read_folder(folder: Path) -> tuple[list[str], list[Any]]:
    ids: list[str] = []
    inputs: list[Any] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() == ".txt":
            inputs.append(path.read_text())
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            inputs.append({"image": str(path.absolute())})
        else:
            continue
        ids.append(path.relative_to(folder).as_posix())
    return ids, inputs


def _read_lines(path: Path) -> tuple[list[str], list[Any]]:
    ids: list[str] = []
    inputs: list[Any] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(content, (str, dict)):
            raise OptionError(f"{path}, line {number} is a {type(content).__name__}: write a string or an object")
        name = str(number)
        if isinstance(content, dict):
            name = str(content.pop("id", number))
            _resolve(content, path.parent.absolute())
        ids.append(name)
        inputs.append(content)
    return ids, inputs


def _resolve(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of images and frames relative to the file that names them; URLs are left to be refused."""
    for key in ("image", "images", "video"):
        value = content.get(key)
        if isinstance(value, str):
            content[key] = value if ":" in value else str(folder / value)
        elif isinstance(value, list):
            content[key] = [str(folder / part) if isinstance(part, str) and ":" not in part else part for part in value]


@dataclass(frozen=True)
class Job:
    """What is to be done: a source, where it goes, how it is embedded, and the parts that its chunks become."""

    source: Source
    output: Path
    options: EncodeOptions
    document: bool  # whether the inputs are what is searched
    keep_going: bool  # whether rows that cannot be processed get an error and a NaN embedding

    @property
    def parts(self) -> Path:
        """The folder of finished chunks."""
        return self.output.with_name(self.output.name + ".parts")

    def part(self, start: int) -> Path:
        """Return the file of the chunk that begins with the input of this number."""
        return self.parts / f"{start:09d}.npz"

    def rows(self, start: int) -> slice:
        """Return a chunk's inputs."""
        return slice(start, min(start + CHUNK, len(self.source.ids)))

    def begin(self, manifest: Manifest, reasoner: RemoteReasoner | None) -> list[int]:
        """Take the parts' folder for this job, and return where the chunks that are not finished start.

        Raises OptionError for an output that exists or cannot be written, and parts that another job left.
        """
        check_output(self.output)
        facts = {
            "inputs": self.source.fingerprint,
            "bundle": manifest.files,
            "options": self.options,
            "document": self.document,
            "keep_going": self.keep_going,
            "reasoner": None if reasoner is None else reasoner.name,
            "columns": COLUMNS,
        }
        claim(self.parts, facts, begun=any(self.parts.glob("*.npz")))
        return [start for start in self._starts() if not self.part(start).exists()]

    def end(self) -> Summary:
        """Make the parts the output, once all are there. Raises BackendError where they are not the source's rows."""
        chunks = [_read_npz(self.part(start)) for start in self._starts()]
        columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in COLUMNS}
        if columns["id"].tolist() != self.source.ids:
            raise BackendError(f"{self.parts} does not hold each row of the source once: move it away, and run again")
        _write(self.output, columns)
        shutil.rmtree(self.parts)
        return Summary(
            rows=len(self.source.ids),
            failures=int((columns["error"] != "").sum()),
            reasoned=int((columns["route"] == "reason").sum()),
            rationale_tokens=int(columns["rationale_tokens"].sum()),
            fallbacks=int((columns["fallback"] != "").sum()),
        )

    def _starts(self) -> range:
        return range(0, len(self.source.ids), CHUNK)


def embed_source(embedder: Embedder, job: Job, done: Callable[[int], None]) -> Summary:
    """Do a job; `done` hears how many more rows are finished.

    Raises InputError, at the row of the source, unless the job keeps going; OptionError as `Job.begin`.
    """
    ids, inputs = job.source.ids, job.source.inputs
    missing = job.begin(embedder.manifest, embedder.reasoner)
    done(len(ids) - sum(len(ids[job.rows(start)]) for start in missing))
    for start, prepared in ahead(lambda start: prepare(embedder, job, inputs[job.rows(start)], start), missing):
        rows = ids[job.rows(start)]
        write_part(job.part(start), rows, embedder.run(prepared))
        done(len(rows))
    return job.end()


def prepare(embedder: Embedder, job: Job, inputs: Sequence[Any], start: int) -> Prepared:
    """Prepare the chunk of a job that starts at this row. Raises InputError at the row of the source."""
    options = embedder.document_options | job.options if job.document else job.options
    try:
        return embedder.prepare(inputs, errors="return" if job.keep_going else "raise", **options)
    except InputError as error:
        raise error.at(start + (error.index or 0)) from error


def ahead(call: Callable[[int], T], arguments: Sequence[int]) -> Iterator[tuple[int, T]]:
    """Yield every argument with what the call makes of it; a second thread calls it for the next one meanwhile."""
    with ThreadPoolExecutor(1) as executor:
        following = [executor.submit(call, argument) for argument in arguments[:1]]
        for index, argument in enumerate(arguments):
            result = following.pop().result()
            following = [executor.submit(call, later) for later in arguments[index + 1 : index + 2]]
            yield argument, result


def check_output(output: Path) -> None:
    """Raise OptionError unless `output` can be written; MissingExtraError if its format needs a missing package."""
    if output.suffix not in FORMATS:
        raise OptionError(f"{output} ends in {output.suffix!r}: the output must end in {' or '.join(FORMATS)}")
    if output.exists():
        raise OptionError(f"{output} exists: move it away, or choose another name")
    if not output.parent.is_dir():
        raise OptionError(f"{output.parent} is not a folder: create it first")
    if output.suffix == ".parquet":
        _parquet()


def write_part(part: Path, ids: Sequence[str], result: EncodeResult) -> None:
    """Write what became of a chunk: whole or not at all."""
    details = result.details
    errors = {error.index: str(error) for error in result.errors}
    columns = {
        "id": np.array(ids),
        "embedding": result.embeddings,
        "route": np.array([detail.route.value if detail else "" for detail in details]),
        "gate_score": np.array([detail.gate_score if detail else np.nan for detail in details], np.float32),
        "rationale": np.array([(detail.rationale or "") if detail else "" for detail in details]),
        "rationale_source": np.array([(detail.rationale_source or "") if detail else "" for detail in details]),
        "rationale_tokens": np.array([detail.rationale_tokens if detail else 0 for detail in details], np.int64),
        "truncated": np.array([bool(detail and detail.truncated) for detail in details]),
        "fallback": np.array([(detail.fallback or "") if detail else "" for detail in details]),
        "error": np.array([errors.get(index, "") for index in range(len(ids))]),
    }
    _write(part, columns)


def _write(target: Path, columns: Columns) -> None:
    with whole(target) as new:
        if target.suffix == ".npz":
            with new.open("wb") as file:
                np.savez(file, allow_pickle=False, **columns)
        else:
            arrow, parquet = _parquet()
            table = {name: list(values) if values.ndim > 1 else values for name, values in columns.items()}
            parquet.write_table(arrow.table(table), new)


def _read_npz(path: Path) -> Columns:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in COLUMNS}


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    return pyarrow, parquet
