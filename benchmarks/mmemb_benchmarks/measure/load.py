"""Open-loop load: requests arrive when they arrive, and what counts is the rate at which latency still holds.

Arrivals are a Poisson process that knows nothing of the server (a closed loop, whose clients wait for answers, hides
what a queue does). The server embeds whatever has arrived, up to a batch, then looks again. A request's latency runs
from its arrival.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.measure import FEWEST_REQUESTS, PRECISION, TARGET
from mmemb_benchmarks.timing import timed
from mmemb_benchmarks.workload import Workload
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import encode_alone, encode_queries
from mmemb_deploy.options import EncodeOptions

HOPELESS = 5  # times the target: a request that is late by so much ends the trial
FIRST_SHARE = 0.5  # of the rate that full batches reach, tried first


class Trial(BaseModel, frozen=True):
    """One rate: latencies in milliseconds, what was completed a second, the mean batch, whether p95 and p50 held."""

    rate_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    completed_per_s: float
    mean_batch: float
    held: bool
    half_held: bool


class ModeLoad(BaseModel, frozen=True):
    """What one mode sustains: the highest rate that held, 0 for none, and the lowest that broke, None for none."""

    idle_ms: float
    sustainable_per_s: float
    broke_per_s: float | None
    trials: list[Trial]  # the rates rising


class LoadResult(BaseModel, frozen=True):
    """`mmemb bench load`."""

    source: str
    target_p95_ms: float
    seconds: float
    batch_size: int
    modes: dict[str, ModeLoad]
    ratio: dict[str, float | None]


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
    workload: Workload,
    options: EncodeOptions,
    *,
    rate: float,
    seconds: float,
    batch_size: int,
    target_ms: float,
    seed: int,
) -> Trial:
    """Serve arrivals at a mean `rate` a second, for so long and at least FEWEST_REQUESTS of them.

    Trials of one seed get the same requests in the same order, only closer together as the rate rises.
    """
    count = max(FEWEST_REQUESTS, round(rate * seconds))
    gaps, kinds = (np.random.default_rng([seed, part]) for part in range(2))
    arrivals = np.cumsum(gaps.exponential(1 / rate, count))
    drawn = kinds.integers(len(workload.pairs), size=count)
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
        encode_queries(embedder, [workload.pairs[index] for index in drawn[served:ready]], **settings)
        now = time.perf_counter() - began
        late[served:ready] = 1000 * (now - arrivals[served:ready])
        served, batches = ready, batches + 1
        if late[served - 1] > HOPELESS * target_ms:
            break
    p50, p95, p99 = np.percentile(late[:served], (50, 95, 99))
    return Trial(
        rate_per_s=rate,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        completed_per_s=served / (time.perf_counter() - began),
        mean_batch=served / batches,
        held=bool(served == count and p95 <= target_ms),
        half_held=bool(p50 <= target_ms),
    )


def measure_load(
    embedder: Embedder,
    workload: Workload,
    options: Mapping[str, EncodeOptions],
    *,
    target_ms: float | None,
    seconds: float,
    trials: int,
    batch_size: int,
    seed: int,
    report: Callable[[str], None],
) -> LoadResult:
    """Narrow down, in at most `trials` trials a mode, the rate whose 95th percentile just stays below the target.

    The modes take turns. Without a target it is TARGET times the mean latency, idle, of the mode that takes longest.
    A trial lasts so many seconds, or as long as the queue needs to outgrow the target at a rate too high by PRECISION.
    """
    some = workload.pairs[:: max(1, len(workload.pairs) // 20)]
    alone: dict[str, list[float]] = {mode: [] for mode in options}
    for mode, _, _, took in encode_alone(embedder, some, options, warm_up=2):
        alone[mode].append(1000 * took)
    idle = {mode: float(np.mean(each)) for mode, each in alone.items()}
    target = TARGET * max(idle.values()) if target_ms is None else target_ms
    seconds = max(seconds, target / 1000 / PRECISION)
    searches = {mode: Search(_capacity(embedder, workload, settings, batch_size)) for mode, settings in options.items()}
    for turn in range(trials):
        for mode, search in searches.items():
            if search.done:
                continue
            rate = search.next_rate()
            report(f"trial {turn + 1} of {trials}: {mode} at {rate:.1f} a second")
            search.add(
                run_trial(
                    embedder,
                    workload,
                    options[mode],
                    rate=rate,
                    seconds=seconds,
                    batch_size=batch_size,
                    target_ms=target,
                    seed=seed,
                )
            )
    always = searches["always"].held
    return LoadResult(
        source=workload.source,
        target_p95_ms=target,
        seconds=seconds,
        batch_size=batch_size,
        modes={
            mode: ModeLoad(
                idle_ms=idle[mode],
                sustainable_per_s=search.held,
                broke_per_s=None if search.broke == float("inf") else search.broke,
                trials=sorted(search.trials, key=lambda trial: trial.rate_per_s),
            )
            for mode, search in searches.items()
        },
        ratio={
            f"{mode} over always": search.held / always if always else None
            for mode, search in searches.items()
            if mode != "always"
        },
    )


def _capacity(embedder: Embedder, workload: Workload, options: EncodeOptions, batch_size: int) -> float:
    """Return requests a second of full batches."""
    some = workload.pairs[: 4 * batch_size]
    settings: EncodeOptions = {**options, "batch_size": batch_size}
    return len(some) / timed(encode_queries, embedder, some, **settings)[1]
