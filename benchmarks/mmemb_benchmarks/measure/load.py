"""The load that is sustained: the rate of arrivals, of which nobody asks whether there is room, that is still in time.

Requests arrive by a Poisson process, alone or in bursts, and their latency runs from when they were due: see
`open_loop`. Several targets are measured in turns, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.measure import FEWEST_REQUESTS, PRECISION, TARGET
from mmemb_benchmarks.measure.open_loop import Answer, Reply, Target, arrivals, offer
from mmemb_benchmarks.workload import Workload
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import Judge, encode_alone
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.serve.ask import Ask

HOPELESS = 5  # times the target: a request that is late by so much ends the trial
FIRST_SHARE = 0.5  # of the rate that full batches reach, tried first


class Trial(BaseModel, frozen=True):
    """One rate: latencies in milliseconds, what was completed a second, whether p95 and p50 held, what was answered.

    Latencies, and shares of routes, are those of the requests that were answered.
    """

    rate_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    completed_per_s: float
    held: bool
    half_held: bool
    reasoned: float | None = None
    degraded_by_load: float = 0.0
    degraded_by_deadline: float = 0.0
    refused: float = 0.0  # of all requests
    late: float = 0.0  # of all requests; those that the target itself gave up
    threshold: float | None = None  # in the mean, where scores were held against one
    hit_at_1: float | None = None  # None where nothing says which embedding is right


class ModeLoad(BaseModel, frozen=True):
    """What one mode sustains: the highest rate that held, 0 for none, and the lowest that broke, None for none."""

    idle_ms: float
    sustainable_per_s: float
    broke_per_s: float | None
    trials: list[Trial]  # the rates rising

    @property
    def highest(self) -> Trial | None:
        """The trial of the highest rate that held."""
        return next((trial for trial in reversed(self.trials) if trial.held), None)


class LoadResult(BaseModel, frozen=True):
    """`mmemb bench load`."""

    source: str
    target_p95_ms: float
    seconds: float
    batch_size: int
    modes: dict[str, ModeLoad]
    ratio: dict[str, float | None]
    target: str = "static batches"  # that the modes were measured on
    burst: float = 1.0  # requests that came together, in the mean
    beside: dict[str, dict[str, ModeLoad]] = {}  # the modes on other targets, in the same run
    cosines: dict[str, float] = {}  # of peers' embeddings to ours, the smallest of each
    left_out: dict[str, str] = {}  # peers, and why

    @property
    def targets(self) -> dict[str, dict[str, ModeLoad]]:
        """The modes of each target, the first one's first."""
        return {self.target: self.modes, **self.beside}


@dataclass
class Search:
    """The highest rate that held and the lowest that did not, as trials narrow them down.

    A machine that stalls for a moment breaks a rate that it sustains: a rate counts as broken when it breaks twice, or
    when half of its requests were late.
    """

    capacity: float  # requests a second, where many are there at once
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

    def found(self, idle_ms: float) -> ModeLoad:
        """Return what is known."""
        return ModeLoad(
            idle_ms=idle_ms,
            sustainable_per_s=self.held,
            broke_per_s=None if self.broke == float("inf") else self.broke,
            trials=sorted(self.trials, key=lambda trial: trial.rate_per_s),
        )


@dataclass(frozen=True)
class Traffic:
    """Requests as they are drawn of a workload: those of one seed are the same in every trial, but for their rate."""

    workload: Workload
    judge: Judge | None  # None where nothing says which embedding is right
    burst: float
    seed: int

    @classmethod
    def of(cls, embedder: Embedder, workload: Workload, *, burst: float, seed: int) -> Traffic:
        """Prepare to judge what comes back, by the candidates' embeddings of this embedder."""
        return cls(workload, Judge(embedder, workload.pairs) if workload.judged else None, burst, seed)

    def asks(self, options: EncodeOptions, *, deadline: float | None = None, on_overload: str = "wait") -> list[Ask]:
        """Return a request for every pair; `deadline` in seconds."""
        return [
            Ask(
                inputs=[pair.query],
                options={**options, "instruction": pair.instruction},
                deadline=deadline,
                on_overload=on_overload,
            )
            for pair in self.workload.pairs
        ]

    def draw(self, rates: Sequence[tuple[float, float]]) -> tuple[list[int], list[float]]:
        """Return which pair each request is of and when it is due, for stretches of so much a second for so long."""
        gaps, kinds = (np.random.default_rng([self.seed, part]) for part in range(2))
        due: list[float] = []
        begins = 0.0
        for rate, seconds in rates:
            due += list(begins + arrivals(rate, round(rate * seconds), self.burst, gaps))
            begins += seconds
        return [int(index) for index in kinds.integers(len(self.workload.pairs), size=len(due))], sorted(due)

    def hit(self, index: int, answer: Answer) -> bool:
        """Return whether an embedding of a pair's query is nearest to a right candidate."""
        assert self.judge is not None
        return self.workload.pairs[index].relevant[self.judge.ranking(index, answer.embedding_D)[0]]

    def summary(
        self, rate: float, drawn: Sequence[int], replies: Sequence[Reply], *, count: int, target_ms: float
    ) -> Trial:
        """Return what replies came to, of `count` requests of which some may never have been sent."""
        answered = [(reply, reply.answer) for reply in replies if reply.answer is not None]
        late = np.array([1000 * reply.seconds for reply, _ in answered] or [np.inf])
        answers = [answer for _, answer in answered]
        p50, p95, p99 = np.percentile(late, (50, 95, 99), method="lower")
        ends, begins = max(reply.due + reply.seconds for reply in replies), min(reply.due for reply in replies)
        thresholds = [answer.threshold for answer in answers if answer.threshold is not None]
        hits = [] if self.judge is None else [self.hit(drawn[reply.number], answer) for reply, answer in answered]
        return Trial(
            rate_per_s=rate,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            completed_per_s=len(answers) / (ends - begins),
            held=bool(len(answers) == count and p95 <= target_ms),
            half_held=bool(p50 <= target_ms),
            reasoned=_mean(answer.reasoned for answer in answers),
            degraded_by_load=_mean(answer.degraded_by == "load" for answer in answers) or 0.0,
            degraded_by_deadline=_mean(answer.degraded_by == "deadline" for answer in answers) or 0.0,
            refused=sum(reply.refused for reply in replies) / len(replies),
            late=sum(reply.answer is None and not reply.refused for reply in replies) / len(replies),
            threshold=_mean(thresholds),
            hit_at_1=_mean(hits),
        )


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return float(np.mean(listed)) if listed else None


async def run_trial(
    target: Target, traffic: Traffic, asks: Sequence[Ask], *, rate: float, seconds: float, target_ms: float
) -> Trial:
    """Offer arrivals at a mean `rate` a second, for so long and at least FEWEST_REQUESTS of them."""
    drawn, due = traffic.draw([(rate, max(seconds, FEWEST_REQUESTS / rate))])
    replies = await offer(target, [asks[index] for index in drawn], due, give_up=HOPELESS * target_ms / 1000)
    return traffic.summary(rate, drawn, replies, count=len(due), target_ms=target_ms)


async def measure_load(
    targets: Mapping[str, Target],
    embedder: Embedder,
    traffic: Traffic,
    options: Mapping[str, EncodeOptions],
    *,
    target_ms: float | None,
    seconds: float,
    trials: int,
    batch_size: int,
    report: Callable[[str], None],
) -> LoadResult:
    """Narrow down, in at most `trials` trials a mode and target, the rate whose p95 just stays below `target_ms`.

    Targets and modes take turns. Without `target_ms` it is TARGET times the mean latency, idle, of the mode that takes
    `embedder` longest. A trial lasts so many seconds, or as long as the queue needs to outgrow that at a rate too high
    by PRECISION. Load takes no reasoning away: what is sustained is of the same quality at every rate.
    """
    idle = idle_ms(embedder, traffic.workload, options)
    limit = TARGET * max(idle.values()) if target_ms is None else target_ms
    seconds = max(seconds, limit / 1000 / PRECISION)
    asks = {mode: traffic.asks(settings) for mode, settings in options.items()}
    searches = {
        (name, mode): Search(await capacity(target, asks[mode][: 4 * batch_size]))
        for name, target in targets.items()
        for mode in options
    }
    for turn in range(trials):
        for (name, mode), search in searches.items():
            if search.done:
                continue
            rate = search.next_rate()
            report(f"trial {turn + 1} of {trials}: {name}, {mode} at {rate:.1f} a second")
            search.add(await run_trial(targets[name], traffic, asks[mode], rate=rate, seconds=seconds, target_ms=limit))
    found = {name: {mode: searches[name, mode].found(idle[mode]) for mode in options} for name in targets}
    first, *others = targets
    return LoadResult(
        source=traffic.workload.source,
        target_p95_ms=limit,
        seconds=seconds,
        batch_size=batch_size,
        modes=found[first],
        ratio=_ratios(found),
        target=first,
        burst=traffic.burst,
        beside={name: found[name] for name in others},
    )


def idle_ms(embedder: Embedder, workload: Workload, options: Mapping[str, EncodeOptions]) -> dict[str, float]:
    """Return each mode's mean latency, alone, in milliseconds."""
    some = workload.pairs[:: max(1, len(workload.pairs) // 20)]
    alone: dict[str, list[float]] = {mode: [] for mode in options}
    for mode, _, _, took in encode_alone(embedder, some, options, warm_up=2):
        alone[mode].append(1000 * took)
    return {mode: float(np.mean(each)) for mode, each in alone.items()}


async def capacity(target: Target, asks: Sequence[Ask]) -> float:
    """Return requests a second, where all are there at once."""
    replies = await offer(target, asks, [0.0] * len(asks))
    return len(asks) / max(reply.seconds for reply in replies)


def _ratios(found: Mapping[str, Mapping[str, ModeLoad]]) -> dict[str, float | None]:
    """Return the first target's modes over its always, and over the same modes of the others."""
    first, *others = found
    modes = found[first]
    pairs: dict[str, tuple[ModeLoad, ModeLoad]] = {}
    if "always" in modes:
        pairs |= {f"{mode} over always": (each, modes["always"]) for mode, each in modes.items() if mode != "always"}
    for name in others:
        pairs |= {f"{mode} over {mode} of {name}": (each, found[name][mode]) for mode, each in modes.items()}
    return {
        told: over.sustainable_per_s / under.sustainable_per_s if under.sustainable_per_s else None
        for told, (over, under) in pairs.items()
    }
