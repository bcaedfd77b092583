"""What moved between two runs beyond noise.

A time moved where the middle halves of its rounds (first to third quartile) do not overlap and the medians differ by
more than the tolerance. The first test sees a difference that the rounds' own spread hides; the second leaves out those
that nobody would act on, and the drift of a machine between two runs, which no round of either sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmemb_benchmarks.measure.latency import LatencyResult
from mmemb_benchmarks.peers.contest import PeersResult
from mmemb_benchmarks.results import Stamped
from mmemb_deploy.errors import OptionError

KINDS = "suite", "latency", "peers"  # of results, that can be compared

Timing = tuple[float, float, float]  # a median and the range that most rounds lie in, all in one unit of time


@dataclass(frozen=True)
class Comparison:
    """Names with the ratio of new over old medians, the largest first; names on one side only; what else differs."""

    slower: dict[str, float]
    faster: dict[str, float]
    unmoved: int
    missing: list[str]
    added: list[str]
    differing: list[str]


def compare(old: Stamped[Any], new: Stamped[Any], tolerance: float) -> Comparison:
    """Compare two results of a kind; `tolerance` is a share of the old median. Raises OptionError for two kinds."""
    if old.kind != new.kind:
        raise OptionError(f"a result of kind {old.kind!r} does not compare with one of {new.kind!r}")
    before, now = _timings(old), _timings(new)
    shared = [name for name in before if name in now]
    moved = {name: ratio for name in shared if (ratio := _moved(before[name], now[name], tolerance))}
    ordered = dict(sorted(moved.items(), key=lambda item: -item[1]))
    were, are = _circumstances(old), _circumstances(new)
    return Comparison(
        slower={name: ratio for name, ratio in ordered.items() if ratio > 1},
        faster={name: ratio for name, ratio in reversed(ordered.items()) if ratio < 1},
        unmoved=len(shared) - len(moved),
        missing=[name for name in before if name not in now],
        added=[name for name in now if name not in before],
        differing=[
            f"{name}: {were.get(name)} before, {are.get(name)} now"
            for name in dict.fromkeys([*were, *are])
            if were.get(name) != are.get(name)
        ],
    )


def _timings(result: Stamped[Any]) -> dict[str, Timing]:
    found = result.result
    if isinstance(found, LatencyResult):
        return {f"{name}: p50": (mode.p50_ms, *mode.p50_ms_spread) for name, mode in found.modes.items()}
    if isinstance(found, PeersResult):
        return {
            f"{name}: {what}": (median, *peer.spread[what])
            for name, peer in found.peers.items()
            for what, median in peer.seconds.items()
        }
    return {benchmark.name: (benchmark.median, benchmark.q1, benchmark.q3) for benchmark in found}


def _circumstances(result: Stamped[Any]) -> dict[str, str | None]:
    """Return what times depend on beside the code."""
    machine, bundle = result.machine, result.bundle
    return {"device": machine.device, **machine.versions, "bundle": None if bundle is None else bundle.hash}


def _moved(old: Timing, new: Timing, tolerance: float) -> float | None:
    """Return the ratio of the medians where it is no noise."""
    (old_median, old_low, old_high), (new_median, new_low, new_high) = old, new
    ratio = new_median / old_median
    apart = new_low > old_high or new_high < old_low
    return ratio if apart and not 1 / (1 + tolerance) <= ratio <= 1 + tolerance else None
