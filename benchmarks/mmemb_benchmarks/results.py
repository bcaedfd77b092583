"""What every result carries beside its figures, and how results are written and read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import AliasPath, BaseModel, Field, ValidationError

from mmemb_benchmarks.measure.frontier import FrontierResult
from mmemb_benchmarks.measure.latency import LatencyResult
from mmemb_benchmarks.measure.load import LoadResult
from mmemb_benchmarks.measure.overload import OverloadResult
from mmemb_benchmarks.peers.contest import PeersResult
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import write_whole
from mmemb_deploy.machine import cores

PACKAGES = {
    "faiss-cpu",
    "mmemb-deploy",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "transformers",
}

R = TypeVar("R")


class Machine(BaseModel, frozen=True):
    """Where something was measured, and the versions of what computed."""

    device: str
    cores: int
    memory_bytes: int
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Machine:
        """Return this machine."""
        found = {package.name.lower(): package.version for package in distributions()}
        packages = {name: found[name] for name in sorted(PACKAGES & found.keys())}
        return cls(
            device=f"{_processor()}, {cores()} cores",
            cores=cores(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            versions={"python": platform.python_version(), **packages},
        )


class BundleFacts(BaseModel, frozen=True):
    """What was measured: a bundle's name, its graphs' precisions, the hash of its manifest, and what runs it."""

    name: str
    precision: str
    hash: str
    backend: str

    @classmethod
    def of(cls, embedder: Embedder) -> BundleFacts:
        """Return those of an embedder's bundle."""
        manifest = embedder.manifest
        return cls(
            name=manifest.model.name,
            precision="/".join(dict.fromkeys(graph.precision for graph in manifest.graphs.values())),
            hash=hashlib.sha256(manifest.model_dump_json().encode()).hexdigest(),
            backend=embedder.backend,
        )


class Stamped(BaseModel, Generic[R], frozen=True):
    """A result in the envelope that all share; `bundle` is None where it is not about one."""

    kind: str
    date: str
    command: str
    machine: Machine
    bundle: BundleFacts | None
    result: R


class Benchmark(BaseModel, frozen=True):
    """A benchmark of the suite, in seconds, out of pytest-benchmark's JSON; `extra_info` has its p95 and its sizes."""

    name: str
    median: float = Field(validation_alias=AliasPath("stats", "median"))
    q1: float = Field(validation_alias=AliasPath("stats", "q1"))
    q3: float = Field(validation_alias=AliasPath("stats", "q3"))
    extra_info: dict[str, float]

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The benchmark's name, median and 95th percentile in milliseconds, and what it ran on, as tables show them."""
        facts = {name: value for name, value in self.extra_info.items() if name != "p95"}
        return (
            self.name.removeprefix("bench_").replace("[", ": ").rstrip("]"),
            digits(1000 * self.median),
            digits(1000 * self.extra_info["p95"]) if "p95" in self.extra_info else "-",
            ", ".join(f"{digits(value)} {name.replace('_', ' ')}" for name, value in facts.items()),
        )


KINDS: dict[str, Any] = {  # of results that are read again
    "latency": Stamped[LatencyResult],
    "frontier": Stamped[FrontierResult],
    "load": Stamped[LoadResult],
    "overload": Stamped[OverloadResult],
    "peers": Stamped[PeersResult],
    "suite": Stamped[list[Benchmark]],
}


def stamp(kind: str, result: R, embedder: Embedder | None) -> Stamped[R]:
    """Return a result in its envelope; `embedder` is None where it is not about one bundle."""
    return Stamped(
        kind=kind,
        date=datetime.now(UTC).date().isoformat(),
        command=command(),
        machine=Machine.here(),
        bundle=None if embedder is None else BundleFacts.of(embedder),
        result=result,
    )


def write(stamped: Stamped[Any], output: Path) -> None:
    """Write a result as one JSON file, whole or not at all."""
    write_whole(output, stamped.model_dump_json(indent=1) + "\n")


def read_result(path: Path, kinds: Iterable[str] = KINDS) -> Stamped[Any]:
    """Read a result of one of some kinds.

    Raises OptionError, naming the file, for one that is malformed or of another kind.
    """
    content = _read(path)
    kind = str(content.get("kind"))
    if kind not in kinds:
        raise OptionError(f"{path} is a result of kind {kind!r}, none of {', '.join(kinds)}")
    try:
        result: Stamped[Any] = KINDS[kind].model_validate(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise OptionError(f"{path} is not a whole result: {where}: {error.errors()[0]['msg']}") from error
    return result


def read_results(sources: Sequence[Path]) -> tuple[list[Stamped[Any]], list[Path]]:
    """Read files, and of folders the files that hold a kind of KINDS; return those passed over too.

    Of several results of one kind for one bundle and backend, the one that comes last counts. Raises OptionError as
    `read_result` does, for a source that does not exist, and where no result is left.
    """
    found: dict[tuple[str, ...], Stamped[Any]] = {}
    passed_over: list[Path] = []
    for source in sources:
        if not source.exists():
            raise OptionError(f"{source} does not exist: pass results of mmemb bench, or folders of them")
        for path in sorted(source.glob("*.json")) if source.is_dir() else [source]:
            if source.is_dir() and _read(path).get("kind") not in KINDS:
                passed_over.append(path)
                continue
            result = read_result(path)
            peers = result.result.peers if isinstance(result.result, PeersResult) else ()
            subject = (result.bundle.name, result.bundle.backend) if result.bundle else ()
            found[(result.kind, *subject, *peers)] = result
    if not found:
        raise OptionError(f"{', '.join(map(str, sources))}: no result of {', '.join(KINDS)} is there")
    return list(found.values()), passed_over


def _read(path: Path) -> dict[str, Any]:
    """Read JSON; pytest-benchmark's becomes a result of kind suite."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        return {}
    if "benchmarks" not in content:
        return content
    return {
        "kind": "suite",
        "date": str(content.get("datetime", ""))[:10],
        "command": content.get("command", "pytest"),
        "machine": content.get("machine_info"),
        "bundle": content.get("bundle"),
        "result": content["benchmarks"],
    }


def digits(value: float) -> str:
    """Return a figure as every table shows it: three significant digits, or all before the point, never an exponent."""
    if abs(value) >= 999.5:
        return f"{value:.0f}"
    return np.format_float_positional(value, 3, unique=False, fractional=False, trim="-")


def command() -> str:
    """Return the command line of `mmemb` or of a script of ours, without the folders of its arguments."""
    program = Path(sys.argv[0]).resolve()
    is_script = program.suffix == ".py" and program.stem != "__main__"
    arguments = (f"'{word}'" if " " in word else word for word in map(_short, sys.argv[1:]))
    return " ".join(["python " + "/".join(program.parts[-2:]) if is_script else "mmemb", *arguments])


def _short(word: str) -> str:
    return Path(word).name if os.sep in word else word


def _processor() -> str:
    """Return the processor's name as Linux tells it, or as the platform does."""
    lines = Path("/proc/cpuinfo")
    if lines.is_file():
        for line in lines.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
