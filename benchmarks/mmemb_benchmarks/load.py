"""Open-loop load: requests arrive when they arrive, and what counts is the rate at which latency still holds.

Arrivals are a Poisson process that knows nothing of the server (a closed loop, whose clients wait for answers, hides
what a queue does). The server embeds whatever has arrived, up to a batch, then looks again. A request's latency runs
from its arrival.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mmemb_benchmarks.startup import timed
from mmemb_benchmarks.traffic import Traffic
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import encode_queries
from mmemb_deploy.options import EncodeOptions

TARGET = 10  # times the idle mean of the slowest mode, where no target is given: less, and the machine's stalls decide
FEWEST = 60  # requests of a trial, so that its p95 means something
HOPELESS = 5  # times the target: a request that is late by so much ends the trial
PRECISION = 0.05  # of a sustainable rate, at which the search for it ends
FIRST_SHARE = 0.5  # of the rate that full batches reach, tried first


@dataclass(frozen=True)
class Trial:
    """One rate: latencies in milliseconds, what was completed a second, the mean batch, whether p95 and p50 held."""

    rate_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    completed_per_s: float
    mean_batch: float
    held: bool
    half_held: bool


@dataclass
class Search:
    """The highest rate that held and the lowest that did not, as trials narrow them down.

    A machine that stalls for a moment breaks a rate that it sustains: a rate counts as broken when it breaks twice, or
    when half of its requests were late.
    """

    capacity: float  # requests a second of full batches
    held: float = 0.0
    broke: float = float("inf")
    doubted: float | None = None  # a rate that broke once
    trials: list[Trial] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the sustainable rate is known well enough."""
        return self.broke <= (1 + PRECISION) * self.held

    def next_rate(self) -> float:
        """Return the rate to try: higher until one breaks, then halfway between."""
        if self.doubted is not None:
            return self.doubted
        if self.broke == float("inf"):
            return self.capacity * FIRST_SHARE if not self.trials else 1.4 * self.trials[-1].rate_per_s
        return (self.held + self.broke) / 2

    def add(self, trial: Trial) -> None:
        """Learn from a trial."""
        self.trials.append(trial)
        if trial.held:
            self.held, self.doubted = max(self.held, trial.rate_per_s), None
        elif self.doubted is None and trial.half_held:
            self.doubted = trial.rate_per_s
        else:
            self.broke, self.doubted = min(self.broke, trial.rate_per_s), None


def run_trial(
    embedder: Embedder,
    traffic: Traffic,
    options: EncodeOptions,
    *,
    rate: float,
    seconds: float,
    batch_size: int,
    target_ms: float,
    seed: int,
) -> Trial:
    """Serve arrivals at a mean `rate` a second, for so long and at least FEWEST of them.

    Trials of one seed get the same requests in the same order, only closer together as the rate rises.
    """
    count = max(FEWEST, round(rate * seconds))
    gaps, kinds = (np.random.default_rng([seed, part]) for part in range(2))
    arrivals = np.cumsum(gaps.exponential(1 / rate, count))
    drawn = kinds.integers(len(traffic.pairs), size=count)
    late = np.empty(count)
    settings: EncodeOptions = {**options, "batch_size": batch_size}
    served = batches = 0
    began = time.perf_counter()
    while served < count:
        now = time.perf_counter() - began
        ready = min(int(np.searchsorted(arrivals, now, "right")), served + batch_size)
        if ready == served:
            time.sleep(arrivals[served] - now)
            continue
        batch = [traffic.pairs[place] for place in drawn[served:ready]]
        encode_queries(embedder, batch, **settings)
        now = time.perf_counter() - began
        late[served:ready] = 1000 * (now - arrivals[served:ready])
        served, batches = ready, batches + 1
        if late[served - 1] > HOPELESS * target_ms:
            break
    p50, p95, p99 = np.percentile(late[:served], (50, 95, 99))
    done_per_s = served / (time.perf_counter() - began)
    held = served == count and p95 <= target_ms
    return Trial(rate, p50, p95, p99, done_per_s, served / batches, bool(held), bool(p50 <= target_ms))


def measure_load(
    embedder: Embedder,
    traffic: Traffic,
    options: dict[str, EncodeOptions],
    *,
    target_ms: float | None,
    seconds: float,
    trials: int,
    batch_size: int,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Narrow down, in at most `trials` trials a mode, the rate whose 95th percentile just stays below the target.

    The modes take turns. Without a target it is TARGET times the mean latency, idle, of the mode that takes longest.
    A trial lasts so many seconds, or as long as the queue needs to outgrow the target at a rate too high by PRECISION.
    """
    idle = {mode: _idle_ms(embedder, traffic, settings) for mode, settings in options.items()}
    target = TARGET * max(idle.values()) if target_ms is None else target_ms
    seconds = max(seconds, target / 1000 / PRECISION)
    searches = {mode: Search(_capacity(embedder, traffic, settings, batch_size)) for mode, settings in options.items()}
    for turn in range(trials):
        for mode, search in searches.items():
            if search.done:
                continue
            rate = search.next_rate()
            report(f"trial {turn + 1} of {trials}: {mode} at {rate:.1f} a second")
            search.add(
                run_trial(
                    embedder,
                    traffic,
                    options[mode],
                    rate=rate,
                    seconds=seconds,
                    batch_size=batch_size,
                    target_ms=target,
                    seed=seed,
                )
            )
    sustained = {mode: search.held for mode, search in searches.items()}
    return {
        "target_p95_ms": target,
        "seconds": seconds,
        "batch_size": batch_size,
        "modes": {
            mode: {
                "idle_ms": idle[mode],
                "sustainable_per_s": search.held,
                "broke_per_s": None if search.broke == float("inf") else search.broke,
                "trials": [asdict(trial) for trial in sorted(search.trials, key=lambda trial: trial.rate_per_s)],
            }
            for mode, search in searches.items()
        },
        "ratio": {
            f"{mode} over always": sustained[mode] / sustained["always"] if sustained["always"] else None
            for mode in options
            if mode != "always"
        },
    }


def _idle_ms(embedder: Embedder, traffic: Traffic, options: EncodeOptions) -> float:
    """Return the mean milliseconds of a request alone, over some that differ."""
    some = traffic.pairs[:: max(1, len(traffic.pairs) // 20)]
    took = [timed(encode_queries, embedder, [pair], **options)[1] for pair in (*some[:2], *some)]
    return 1000 * float(np.mean(took[2:]))


def _capacity(embedder: Embedder, traffic: Traffic, options: EncodeOptions, batch_size: int) -> float:
    """Return requests a second of full batches."""
    some = traffic.pairs[: 4 * batch_size]
    settings: EncodeOptions = {**options, "batch_size": batch_size}
    return len(some) / timed(encode_queries, embedder, some, **settings)[1]
