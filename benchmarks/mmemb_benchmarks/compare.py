"""What moved between two runs beyond noise.

A time moved where the middle halves of its rounds (first to third quartile) do not overlap and the medians differ by
more than the tolerance. The first test sees a difference that the rounds' own spread hides; the second leaves out those
that nobody would act on, and the drift of a machine between two runs, which no round of either sees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import OptionError

FIGURES = "suite", "latency", "peers"


@dataclass(frozen=True)
class Timing:
    """A median and the range that most rounds lie in, all in one unit of time."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """The times of one run by name, and what they depend on beside the code."""

    kind: str
    circumstances: dict[str, Any]
    timings: dict[str, Timing]


@dataclass(frozen=True)
class Comparison:
    """Names with the ratio of new over old medians, the largest first; names on one side only; what else differs."""

    slower: dict[str, float]
    faster: dict[str, float]
    unmoved: int
    missing: list[str]
    added: list[str]
    differing: list[str]


def read_run(path: Path) -> Run:
    """Read pytest-benchmark's JSON, or a result of `mmemb bench latency` or `peers`.

    Raises OptionError, naming the file, for one that is none of them.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{path} holds no result: {', '.join(FIGURES)} can be compared")
    kind = "suite" if "benchmarks" in content else str(content.get("kind"))
    readers = {"suite": _suite, "latency": _latency, "peers": _peers}
    if kind not in readers:
        raise OptionError(f"{path} is a result of kind {kind!r}: {', '.join(FIGURES)} can be compared")
    try:
        machine = content["machine_info" if kind == "suite" else "machine"]
        bundle = content.get("bundle") or {}
        circumstances = {"device": machine["device"], **machine["versions"], "bundle": bundle.get("hash")}
        return Run(kind, circumstances, readers[kind](content))
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{path} is not a whole result of kind {kind!r}: {error!r} is missing or wrong") from error


def compare(old: Run, new: Run, tolerance: float) -> Comparison:
    """Compare two runs of one kind; `tolerance` is a share of the old median. Raises OptionError for two kinds."""
    if old.kind != new.kind:
        raise OptionError(f"a result of kind {old.kind!r} does not compare with one of {new.kind!r}")
    shared = [name for name in old.timings if name in new.timings]
    moved = {name: ratio for name in shared if (ratio := _moved(old.timings[name], new.timings[name], tolerance))}
    ordered = dict(sorted(moved.items(), key=lambda item: -item[1]))
    return Comparison(
        slower={name: ratio for name, ratio in ordered.items() if ratio > 1},
        faster={name: ratio for name, ratio in reversed(ordered.items()) if ratio < 1},
        unmoved=len(shared) - len(moved),
        missing=[name for name in old.timings if name not in new.timings],
        added=[name for name in new.timings if name not in old.timings],
        differing=[
            f"{name}: {old.circumstances.get(name)} before, {new.circumstances.get(name)} now"
            for name in dict.fromkeys([*old.circumstances, *new.circumstances])
            if old.circumstances.get(name) != new.circumstances.get(name)
        ],
    )


def _moved(old: Timing, new: Timing, tolerance: float) -> float | None:
    """Return the ratio of the medians where it is no noise."""
    ratio = new.median / old.median
    apart = new.low > old.high or new.high < old.low
    return ratio if apart and not 1 / (1 + tolerance) <= ratio <= 1 + tolerance else None


def _suite(content: Mapping[str, Any]) -> dict[str, Timing]:
    stats = {benchmark["name"]: benchmark["stats"] for benchmark in content["benchmarks"]}
    return {name: Timing(each["median"], each["q1"], each["q3"]) for name, each in stats.items()}


def _latency(content: Mapping[str, Any]) -> dict[str, Timing]:
    modes = content["result"]["modes"]
    return {f"{name}: p50": Timing(mode["p50_ms"], *mode["p50_ms_spread"]) for name, mode in modes.items()}


def _peers(content: Mapping[str, Any]) -> dict[str, Timing]:
    return {
        f"{name}: {what}": Timing(median, *peer["spread"][what])
        for name, peer in content["result"]["peers"].items()
        for what, median in peer["seconds"].items()
    }
