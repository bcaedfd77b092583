"""What a service does with more than it can do: less reasoning, deadlines kept, a fast path that stays fast.

Everything here asks the two-route loop in process. Axes: Q requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.measure import FEWEST_REQUESTS, TARGET
from mmemb_benchmarks.measure.load import Traffic, Trial, capacity, idle_ms, measure_load
from mmemb_benchmarks.measure.open_loop import Reply, offer
from mmemb_benchmarks.measure.targets import TwoRoutes
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.routes import Outcome, Routes, measure_routes
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.serve.ask import Ask

LEVELS = 0.5, 1.0, 1.5, 2.0, 0.5  # times the sustained rate, one after the other
DEADLINES = 0.5, 1.0, 2.0  # times the mean latency, idle, of always
DEADLINE_LOAD = 0.5  # of the rate that always sustains
TELLING = 0.001  # seconds that an answer in time may take from the target to here
WINDOW = 1.0  # seconds of requests, of which the first whose p95 is in time ends an overload
ROUNDS = 3  # of the mixed and the fast traffic, in turns


class Level(BaseModel, frozen=True):
    """One rate, and what the same requests would have come to without load, and by other choices of those to reason."""

    load: float  # times the sustained rate
    trial: Trial
    never: float | None  # hit@1, as the others; None where nothing says which embedding is right
    auto: float | None
    always: float | None
    random: float | None  # of as many as reasoned, drawn at random
    oracle: float | None  # of as many, by what becomes of them


class Deadline(BaseModel, frozen=True):
    """What became of requests that were all to reason, by a deadline from when they were sent; shares of all."""

    deadline_ms: float
    times_idle: float
    reasoned: float
    direct: float
    refused: float
    late: float  # and said so
    unsaid: float  # answered after the deadline
    worst_unsaid_ms: float  # by how much


class Mixed(BaseModel, frozen=True):
    """p95 of requests that do not reason: while as many others do, and alone at an equal utilisation; medians."""

    rate_per_s: float  # of all
    alone_per_s: float
    utilisation: float  # the rate over what is reached where all are there at once
    p95_ms: float
    alone_p95_ms: float
    ratio: float
    rounds: list[tuple[float, float]]  # p95 of each: mixed, alone


class OverloadResult(BaseModel, frozen=True):
    """`mmemb bench overload`."""

    source: str
    target_p95_ms: float
    sustained_per_s: dict[str, float]
    seconds: float
    batch_size: int
    levels: list[Level]
    recovery_s: float | None  # None where no second of the last level was within the target
    deadlines: list[Deadline]
    mixed: Mixed


async def measure_levels(
    target: TwoRoutes,
    traffic: Traffic,
    routes: Routes | None,
    options: EncodeOptions,
    *,
    threshold: float,
    sustained: float,
    levels: Sequence[float] = LEVELS,
    seconds: float,
    target_ms: float,
) -> tuple[list[Level], float | None]:
    """Offer the levels one after the other, load being free to take reasoning away; return them and the recovery.

    `routes` are those of every pair of the traffic, None where nothing is judged; `threshold` is the bundle's.
    """
    asks = traffic.asks(options, on_overload="direct")
    drawn, due = traffic.draw([(level * sustained, seconds) for level in levels])
    replies = await offer(target, [asks[index] for index in drawn], due)
    made: list[Level] = []
    for place, level in enumerate(levels):
        there = [reply for reply in replies if place * seconds <= reply.due < (place + 1) * seconds]
        trial = traffic.summary(level * sustained, drawn, there, count=len(there), target_ms=target_ms)
        hits: Mapping[str, float] = {}
        if routes is not None and trial.reasoned is not None:
            asked = _taken(routes, [drawn[reply.number] for reply in there if reply.answer is not None])
            chosen = {
                "never": asked.never,
                "auto": asked.gate(threshold),
                "always": asked.always,
                "random": asked.random(trial.reasoned),
                "oracle": asked.oracle(trial.reasoned),
            }
            hits = {name: float(outcome.hits_Q.mean()) for name, outcome in chosen.items()}
        choices = ("never", "auto", "always", "random", "oracle")
        made.append(Level(load=level, trial=trial, **{name: hits.get(name) for name in choices}))
    return made, recovery_s(replies, (len(levels) - 1) * seconds, target_ms)


def _taken(routes: Routes, indices: Sequence[int]) -> Routes:
    def taken(outcome: Outcome) -> Outcome:
        return Outcome(*(getattr(outcome, field.name)[indices] for field in fields(outcome)))

    return Routes(taken(routes.never), taken(routes.always))


def recovery_s(replies: Sequence[Reply], since: float, target_ms: float) -> float | None:
    """Return the seconds from `since` to the first WINDOW of requests whose p95 is within the target; None without.

    p95 is that of the answered ones; a WINDOW of which all were refused is not within the target.
    """
    windows: dict[int, list[float]] = {}
    for reply in replies:
        if reply.due >= since and reply.answer is not None:
            windows.setdefault(int((reply.due - since) / WINDOW), []).append(1000 * reply.seconds)
    in_time = (window for window in sorted(windows) if np.percentile(windows[window], 95) <= target_ms)
    first = next(in_time, None)
    return None if first is None else first * WINDOW


async def measure_deadlines(
    target: TwoRoutes, traffic: Traffic, options: EncodeOptions, *, always_ms: float, rate: float, seconds: float
) -> list[Deadline]:
    """Ask for reasoning by deadlines around what it takes idle, `always_ms`, at a rate."""
    made = []
    for times in DEADLINES:
        deadline = times * always_ms / 1000
        asks = traffic.asks(options, deadline=deadline, on_overload="direct")
        drawn, due = traffic.draw([(rate, max(seconds, FEWEST_REQUESTS / rate))])
        replies = await offer(target, [asks[index] for index in drawn], due)
        answered = [(reply, reply.answer) for reply in replies if reply.answer is not None]
        took = [reply.seconds - reply.lag for reply, _ in answered]
        over = [seconds - deadline for seconds in took if seconds > deadline + TELLING]
        in_time = [answer for (_, answer), seconds in zip(answered, took, strict=True) if seconds <= deadline + TELLING]
        every = len(replies)
        made.append(
            Deadline(
                deadline_ms=1000 * deadline,
                times_idle=times,
                reasoned=sum(answer.reasoned for answer in in_time) / every,
                direct=sum(not answer.reasoned for answer in in_time) / every,
                refused=sum(reply.refused for reply in replies) / every,
                late=sum(reply.answer is None and not reply.refused for reply in replies) / every,
                unsaid=len(over) / every,
                worst_unsaid_ms=1000 * max(over, default=0.0),
            )
        )
    return made


async def measure_mixed(
    target: TwoRoutes, traffic: Traffic, options: Mapping[str, EncodeOptions], *, rate: float, seconds: float
) -> Mixed:
    """Let half of the requests reason and half not, at a rate together; then the latter alone, in turns.

    Both at the same share of what they reach where all are there at once, in full batches.
    """
    never, always = (traffic.asks(options[mode]) for mode in ("never", "always"))
    rng = np.random.default_rng([traffic.seed, 2])

    def half(drawn: Sequence[int]) -> list[Ask]:
        return [(always if up else never)[index] for index, up in zip(drawn, rng.random(len(drawn)) < 0.5, strict=True)]

    async def fast(rate: float, choose: Callable[[Sequence[int]], list[Ask]]) -> float:
        """Return the p95 in ms of those that do not reason."""
        drawn, due = traffic.draw([(rate, max(seconds, FEWEST_REQUESTS / rate))])
        asks = choose(drawn)
        replies = await offer(target, asks, due)
        took = [1000 * reply.seconds for reply in replies if asks[reply.number].options.get("reasoning") == "never"]
        return float(np.percentile(took, 95))

    def alone(drawn: Sequence[int]) -> list[Ask]:
        return [never[index] for index in drawn]

    numbers = range(len(never))
    reached = [(await capacity(target, half(numbers)), await capacity(target, alone(numbers))) for _ in range(ROUNDS)]
    most, most_alone = (float(np.median(side)) for side in zip(*reached, strict=True))
    alone_rate = rate * most_alone / most
    rounds = [(await fast(rate, half), await fast(alone_rate, alone)) for _ in range(ROUNDS)]
    p95, alone_p95 = (float(np.median(side)) for side in zip(*rounds, strict=True))
    return Mixed(
        rate_per_s=rate,
        alone_per_s=alone_rate,
        utilisation=rate / most,
        p95_ms=p95,
        alone_p95_ms=alone_p95,
        ratio=p95 / alone_p95,
        rounds=rounds,
    )


async def measure_overload(
    embedder: Embedder,
    traffic: Traffic,
    options: Mapping[str, EncodeOptions],
    *,
    target_ms: float | None,
    seconds: float,
    trials: int,
    batch_size: int,
    patience_ms: float | None,
    report: Callable[[str], None],
) -> OverloadResult:
    """Find what auto and always sustain, in at most so many trials each, then go beyond it.

    `options` are those of never, auto and always, `patience_ms` is what an input may wait before load is high, an
    eighth of the target by default; levels refuse what would wait for a quarter of it. Raises OptionError for a bundle
    without a gate.
    """
    gate = embedder.manifest.gate
    if gate is None:
        raise OptionError(f"{embedder.manifest.model.name} does not reason: load has nothing to take away from it")
    idle = idle_ms(embedder, traffic.workload, options)
    limit = TARGET * max(idle.values()) if target_ms is None else target_ms
    report("both routes of every query")
    routes = None if traffic.judge is None else measure_routes(embedder, traffic.workload.pairs, judge=traffic.judge)
    patience = (limit / 8 if patience_ms is None else patience_ms) / 1000
    async with TwoRoutes(embedder, batch_size, patience=patience) as target:
        found = await measure_load(
            {"two-route": target},
            embedder,
            traffic,
            {mode: options[mode] for mode in ("auto", "always")},
            target_ms=limit,
            seconds=min(seconds, 5.0),
            trials=trials,
            batch_size=batch_size,
            report=report,
        )
    sustained = {mode: load.sustainable_per_s for mode, load in found.modes.items()}
    if not all(sustained.values()):
        raise OptionError(f"p95 is never below {limit:.3g} ms: raise --p95-ms, --trials, or let nothing else run")
    report(f"{', '.join(map(str, LEVELS))} times {sustained['auto']:.1f} a second, {seconds:g} s each")
    async with TwoRoutes(embedder, batch_size, patience=patience, max_wait=limit / 4000) as target:
        levels, recovery = await measure_levels(
            target,
            traffic,
            routes,
            options["auto"],
            threshold=gate.threshold,
            sustained=sustained["auto"],
            seconds=seconds,
            target_ms=limit,
        )
    async with TwoRoutes(embedder, batch_size, patience=patience) as target:
        report("deadlines")
        deadlines = await measure_deadlines(
            target,
            traffic,
            options["always"],
            always_ms=idle["always"],
            rate=DEADLINE_LOAD * sustained["always"],
            seconds=seconds / 3,
        )
        report("a fast path beside reasoning, and alone")
        mixed = await measure_mixed(target, traffic, options, rate=sustained["always"], seconds=seconds / 6)
    return OverloadResult(
        source=traffic.workload.source,
        target_p95_ms=limit,
        sustained_per_s=sustained,
        seconds=seconds,
        batch_size=batch_size,
        levels=levels,
        recovery_s=recovery,
        deadlines=deadlines,
        mixed=mixed,
    )
