"""A job: a source that becomes one file of vectors, in chunks that survive an interruption.

Finished chunks lie in `OUTPUT.parts/` until all are there; then they become OUTPUT in one rename. The same job, run
again, goes on with those that are missing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.errors import BackendError, OptionError
from mmemb_deploy.files import claim, whole
from mmemb_deploy.jobs.parts import COLUMNS, read_part, write_npz, write_parquet
from mmemb_deploy.jobs.readers import load_pyarrow
from mmemb_deploy.jobs.source import Source, fingerprint_of
from mmemb_deploy.options import EncodeOptions

if TYPE_CHECKING:
    from mmemb_deploy.reasoners.remote import RemoteReasoner

FORMATS = (".npz", ".parquet")


@dataclass(frozen=True)
class Summary:
    """What a job did: rows, failed rows, rows that reasoned, their rationales' tokens, rows that fell back."""

    rows: int
    failures: int
    reasoned: int
    rationale_tokens: int
    fallbacks: int  # rows that a reasoner failed on and that got their direct embedding


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
        return parts_of(self.output)

    def part(self, start: int) -> Path:
        """Return the file of the chunk that begins with the input of this number."""
        return self.parts / f"{start:09d}.npz"

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
            "chunk": self.source.chunk,
        }
        claim(self.parts, facts, begun=any(self.parts.glob("*.npz")))
        finished = {path.name for path in self.parts.iterdir()}
        return [start for start in self.source.starts if self.part(start).name not in finished]

    def end(self, manifest: Manifest) -> Summary:
        """Make the parts the output, once all are there. Raises BackendError where they are not the source's rows."""
        parts = [self.part(start) for start in self.source.starts]
        summary = self._summary(parts)
        with whole(self.output) as new:
            if self.output.suffix == ".npz":
                write_npz(new, parts, summary.rows, manifest.identity)
            else:
                write_parquet(new, parts, manifest.identity)
        shutil.rmtree(self.parts)
        return summary

    def _summary(self, parts: list[Path]) -> Summary:
        rows = failures = reasoned = tokens = fallbacks = 0
        for mark, part in zip(self.source.marks, parts, strict=True):
            chunk = read_part(part, ["id", "error", "route", "rationale_tokens", "fallback"])
            if fingerprint_of(chunk["id"].tolist()) != mark.names:
                raise BackendError(f"{part} does not hold each row of the source once: move it away, and run again")
            rows += len(chunk["id"])
            failures += int((chunk["error"] != "").sum())
            reasoned += int((chunk["route"] == "reason").sum())
            tokens += int(chunk["rationale_tokens"].sum())
            fallbacks += int((chunk["fallback"] != "").sum())
        return Summary(rows, failures, reasoned, tokens, fallbacks)


def parts_of(output: Path) -> Path:
    """Return the folder of finished chunks of a job's output."""
    return output.with_name(output.name + ".parts")


def check_output(output: Path) -> None:
    """Raise OptionError unless `output` can be written; MissingExtraError if its format needs a missing package."""
    if output.suffix not in FORMATS:
        raise OptionError(f"{output} ends in {output.suffix!r}: the output must end in {' or '.join(FORMATS)}")
    if output.exists():
        ended = f"; it is whole, and {parts_of(output)} can be removed" if parts_of(output).exists() else ""
        raise OptionError(f"{output} exists: move it away, or choose another name{ended}")
    if not output.parent.is_dir():
        raise OptionError(f"{output.parent} is not a folder: create it first")
    if output.suffix == ".parquet":
        load_pyarrow()
