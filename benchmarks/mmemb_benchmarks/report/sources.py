"""The results that a report reads, checked before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mmemb_deploy.errors import OptionError

Pair = tuple[float, float]


class Part(BaseModel):
    """A part of a result; a report reads the fields it knows and lets others be."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Machine(Part):
    """Where a result was measured."""

    device: str
    versions: dict[str, str]


class BundleFacts(Part):
    """What was measured."""

    name: str
    precision: str
    hash: str
    backend: str


class LatencyMode(Part):
    """Times of one mode, in milliseconds where nothing else is said."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    p50_ms_spread: Pair
    throughput_per_s: float
    reasoning_rate: float
    rationale_tokens: float
    hit_at_1: float | None
    joules_per_request: float | None
    stages_ms: dict[str, float]


class Ceiling(Part):
    """What the machine can do, and the shares of it that a prompt alone reaches."""

    copy_gb_per_s: float
    matmul_gflop_per_s: float
    matmul_type: str
    prefill_share: float
    decode_share: float


class Latency(Part):
    """`mmemb bench latency`."""

    requests: int
    rounds: int
    batch_size: int
    source: str
    ceiling: Ceiling
    modes: dict[str, LatencyMode]


class Point(Part):
    """One way to choose who reasons."""

    threshold: float | None
    reasoning_rate: float
    hit_at_1: float
    latency_ms: float
    rationale_tokens: float


class Frontier(Part):
    """`mmemb bench frontier`."""

    pairs: int
    source: str
    default: Point
    curve: list[Point]
    random: list[Point]
    oracle: list[Point]


class Trial(Part):
    """One rate of arrivals."""

    rate_per_s: float
    p95_ms: float
    held: bool


class LoadMode(Part):
    """What one mode sustains."""

    sustainable_per_s: float
    trials: list[Trial]


class Load(Part):
    """`mmemb bench load`."""

    target_p95_ms: float
    batch_size: int
    source: str
    modes: dict[str, LoadMode]
    ratio: dict[str, float | None]


class Peer(Part):
    """One contender."""

    cosine: float
    seconds: dict[str, float]


class Peers(Part):
    """`mmemb bench peers`."""

    tokens: int
    threads: int
    rounds: int
    baseline: str
    peers: dict[str, Peer]
    left_out: dict[str, str]


class Stats(Part):
    """Seconds."""

    median: float
    rounds: int


class Benchmark(Part):
    """One benchmark of the suite; `extra_info` holds its tokens and p95."""

    name: str
    stats: Stats
    extra_info: dict[str, float]


class Stamped(Part):
    """What all results carry."""

    date: str
    command: str
    machine: Machine
    bundle: BundleFacts | None


class LatencyResult(Stamped):
    """Times with and without reasoning."""

    kind: Literal["latency"]
    result: Latency


class FrontierResult(Stamped):
    """Quality against latency."""

    kind: Literal["frontier"]
    result: Frontier


class LoadResult(Stamped):
    """Sustainable rates."""

    kind: Literal["load"]
    result: Load


class PeersResult(Stamped):
    """The same weights elsewhere."""

    kind: Literal["peers"]
    result: Peers


class SuiteResult(Stamped):
    """The suite, from pytest-benchmark's JSON."""

    kind: Literal["suite"]
    result: list[Benchmark]


Result = LatencyResult | FrontierResult | LoadResult | PeersResult | SuiteResult
READ: TypeAdapter[Result] = TypeAdapter(Annotated[Result, Field(discriminator="kind")])
KINDS = "latency", "frontier", "load", "peers", "suite"


def read_results(sources: Sequence[Path]) -> tuple[list[Result], list[Path]]:
    """Read files, and of folders the files that hold a kind of result that a report shows; return those passed over.

    Of several results of one kind for one bundle and backend, the one that comes last counts. Raises OptionError,
    naming the file, for one that is malformed, or that is named itself and no such result; and where none is left.
    """
    found: dict[tuple[str, ...], Result] = {}
    passed_over: list[Path] = []
    for path, named in _files(sources):
        content = _read(path)
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind not in KINDS:
            if named:
                raise OptionError(f"{path} is a result of kind {kind!r}: a report shows {', '.join(KINDS)}")
            passed_over.append(path)
            continue
        try:
            result = READ.validate_python(content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise OptionError(f"{path} is not a whole result: {where}: {error.errors()[0]['msg']}") from error
        bundle = result.bundle
        found[(kind, "" if bundle is None else bundle.name + bundle.backend, _subject(result))] = result
    if not found:
        raise OptionError(f"{', '.join(map(str, sources))}: no result of {', '.join(KINDS)} is there")
    return list(found.values()), passed_over


def _subject(result: Result) -> str:
    return "".join(result.result.peers) if isinstance(result, PeersResult) else ""


def _files(sources: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield the files, and whether a user named each."""
    for source in sources:
        if source.is_dir():
            yield from ((path, False) for path in sorted(source.glob("*.json")))
        elif source.is_file():
            yield source, True
        else:
            raise OptionError(f"{source} does not exist: pass results of mmemb bench, or folders of them")


def _read(path: Path) -> Any:
    """Read JSON; pytest-benchmark's becomes a result of kind suite."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict) and "benchmarks" in content:
        return {
            "kind": "suite",
            "date": str(content.get("datetime", ""))[:10],
            "command": content.get("command", "pytest"),
            "machine": content.get("machine_info"),
            "bundle": content.get("bundle"),
            "result": content["benchmarks"],
        }
    return content
