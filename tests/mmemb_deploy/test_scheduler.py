"""The scheduler on a virtual clock: whatever comes, in whatever order, ends once and in time, and leaves nothing."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmemb_benchmarks.simulation import engine as simulation
from mmemb_benchmarks.simulation.engine import SimulatedCosts, SimulatedEngine, SimulatedInput
from mmemb_deploy import BackendError, DeadlineError, Embedder, OverloadError
from mmemb_deploy.bundle.manifest import CurvePoint
from mmemb_deploy.routing.costs import Costs, Line, Mean
from mmemb_deploy.routing.items import Item
from mmemb_deploy.routing.jobs import PATIENCE, Bounds, Call, Job, Pace
from mmemb_deploy.routing.load import UTILISATION, LoadGate, Work
from mmemb_deploy.routing.router import Policy
from mmemb_deploy.routing.scheduler import STALL, Scheduler

SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
COSTS = SimulatedCosts(prompts=lambda rows, tokens: 0.002 + 1e-5 * rows * tokens, step=lambda rows: 0.004 + 1e-4 * rows)


@pytest.fixture(autouse=True, scope="module")
def one_prompt_format() -> None:
    simulation._prompt = cache(simulation._prompt)  # pyright: ignore[reportPrivateUsage]


@dataclass
class Served:
    """A scheduler over simulated inputs, and what became of each."""

    inputs: list[SimulatedInput] = field(default_factory=list)
    pace: Pace = field(default_factory=lambda: Pace(patient=False, prompts=4, rationales=4))
    cache_tokens: float = math.inf
    load: LoadGate | None = None
    costs: SimulatedCosts = COSTS
    lane: bool = False

    def __post_init__(self) -> None:
        self.engine = SimulatedEngine(self.inputs, self.costs, self.cache_tokens, lane=self.lane)
        self.scheduler = Scheduler(self.engine.paths, self.pace, self.engine.clock, load=self.load)
        self.ended: Counter[int] = Counter()
        self.order: list[int] = []
        self.when: dict[int, float] = {}

    def job(self, given: SimulatedInput, call: Call, reasoning: str = "auto", **more: Any) -> Job:
        """Return a job of an input."""
        self.inputs.append(given)
        number = len(self.inputs) - 1
        item = Item(number, given.row(number), 0.0)
        return Job(item, Policy(reasoning), 20, call, ended=self._end, **more)

    def submit(self, given: SimulatedInput, reasoning: str = "auto", **more: Any) -> Job:
        """Submit an input alone."""
        job = self.job(given, Call(), reasoning, **more)
        self.scheduler.submit([job])
        return job

    def _end(self, job: Job) -> None:
        self.ended[job.item.index] += 1
        self.order.append(job.item.index)
        self.when[job.item.index] = self.engine.clock.now

    def run(self) -> None:
        """Run until there is nothing to do."""
        while self.scheduler.advance():
            pass

    def check_left_nothing(self) -> None:
        """Every row has been given back, and nothing is counted."""
        gc.collect()
        assert len(self.engine.decoder.rows) == 0
        queue = self.scheduler
        assert (queue.waiting, queue.reasoning, queue.cache_tokens) == (0, 0, 0)


def value(job: Job) -> float:
    """Return the one number of an embedding."""
    assert job.item.embedding_D is not None
    return float(job.item.embedding_D[0])


@pytest.fixture(scope="module", autouse=True)
def garbage_of_these_tests_alone() -> Iterator[None]:
    """Keep `check_left_nothing` from searching a million objects of torch's, once for every example."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


INPUTS = st.builds(SimulatedInput, st.integers(1, 60), st.floats(0, 1), st.integers(0, 25))


class Traffic(RuleBasedStateMachine):
    """Calls, cancellations, failures and time, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []
        self.doomed: set[int] = set()
        self.hiccups = self.stumbles = 0

    @initialize(
        rows=st.integers(1, 6),
        cache_tokens=st.sampled_from([90.0, 300.0, math.inf]),
        loaded=st.booleans(),
        lane=st.booleans(),
    )
    def begin(self, rows: int, cache_tokens: float, loaded: bool, lane: bool) -> None:
        load = LoadGate([], patience=0.05) if loaded else None
        pace = Pace(patient=False, prompts=rows, rationales=rows, bounds=Bounds(rows=40, tokens=1200))
        self.served = Served(pace=pace, cache_tokens=cache_tokens, load=load, lane=lane)
        self.served.engine.decoder.fails = self.fail

    def fail(self, numbers: list[int]) -> None:
        if self.doomed & set(numbers):
            raise BackendError("this input breaks the engine")
        if self.hiccups:
            self.hiccups -= 1
            self.stumbles += 1
            raise BackendError("the engine stumbles")

    @rule(
        inputs=st.lists(INPUTS, min_size=1, max_size=5),
        reasoning=st.sampled_from(["auto", "always", "never"]),
        quota=st.none() | st.integers(0, 5),
        priority=st.integers(-2, 2),
        slack=st.none() | st.floats(0.001, 2),
        yields=st.booleans(),
        exact=st.booleans(),
    )
    def call(
        self,
        inputs: list[SimulatedInput],
        reasoning: str,
        quota: int | None,
        priority: int,
        slack: float | None,
        yields: bool,
        exact: bool,
    ) -> None:
        call = Call(quota if reasoning == "auto" else None)
        deadline = math.inf if slack is None else self.served.engine.clock.now + slack
        more = {"priority": priority, "deadline": deadline, "yields": yields and reasoning == "auto", "exact": exact}
        jobs = [self.served.job(each, call, reasoning, **more) for each in inputs]
        with suppress(OverloadError):
            self.served.scheduler.submit(jobs)
            self.jobs += jobs

    @rule(runs=st.integers(1, 12))
    def advance(self, runs: int) -> None:
        for _ in range(runs):
            self.served.scheduler.advance()

    @rule(seconds=st.floats(0, 1))
    def wait(self, seconds: float) -> None:
        self.served.engine.clock.now += seconds

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.served.scheduler.cancel([data.draw(st.sampled_from(self.jobs))])

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def doom(self, data: st.DataObject) -> None:
        self.doomed.add(data.draw(st.sampled_from(self.jobs)).item.index)

    @rule()
    def stumble(self) -> None:
        self.hiccups += 1

    @invariant()
    def the_cache_stays_within_its_bound(self) -> None:
        scheduler, rows = self.served.scheduler, self.served.pace.rationales
        alone = max((job.item.row.length + job.after for job in self.jobs), default=0)
        kept = sum(job.item.row.length + job.after for job in self.jobs if job.call.chooses(job) and job.cache)
        assert scheduler.cache_tokens <= max(self.served.cache_tokens, alone) + kept
        assert scheduler.decoded <= rows

    def teardown(self) -> None:
        if not hasattr(self, "served"):
            return
        self.served.run()
        for job in self.jobs:
            assert self.served.ended[job.item.index] == 1
            if job.cancelled or job.error is not None:
                continue
            item = job.item
            assert self.served.when[item.index] <= job.deadline
            assert value(job) == item.index + (0.5 if item.reasoned else 0)
            if item.reasoned is not None:
                assert len(item.reasoned.token_ids) == min(self.served.inputs[item.index].rationale, 20)
            if item.degraded_by is not None:
                assert item.reasoned is None
                assert not job.exact
            elif job.policy.reasoning == "always":
                assert item.reasoned is not None
        failed = {job.item.index for job in self.jobs if isinstance(job.error, BackendError)}
        assert len(failed - self.doomed) <= self.stumbles
        self.served.check_left_nothing()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=SLOW,
    phases=[Phase.generate],
)


def test_only_the_input_at_fault_fails() -> None:
    served = Served()

    def fail(numbers: list[int]) -> None:
        if 2 in numbers:
            raise BackendError("this input breaks the engine")

    served.engine.decoder.fails = fail
    jobs = [served.submit(SimulatedInput(10, 1.0, 5)) for _ in range(4)]
    served.run()
    assert [job.error is None for job in jobs] == [True, True, False, True]
    assert [value(job) for job in jobs if job.error is None] == [0.5, 1.5, 3.5]
    served.check_left_nothing()


def test_where_nobody_waits_for_a_single_row_a_failure_is_raised_at_once() -> None:
    served = Served(pace=Pace())

    def fail(_: list[int]) -> None:
        raise BackendError("the engine breaks")

    served.engine.decoder.fails = fail
    served.submit(SimulatedInput(10))
    with pytest.raises(BackendError, match="breaks"):
        served.scheduler.advance()


@pytest.mark.parametrize("tokens", [5, 300])
def test_prompts_and_rationales_share_the_time_and_neither_waits_for_long(tokens: int) -> None:
    served = Served(pace=Pace(patient=False, prompts=1, rationales=4))
    for _ in range(4):
        served.submit(SimulatedInput(10, 1.0, 20), "always")
    served.engine.clock.now += 1e-6
    for _ in range(200):
        served.submit(SimulatedInput(tokens, 0.0), "never")
    runs = Counter[bool]()
    spent, since, longest = ({True: 0.0, False: 0.0} for _ in range(3))
    while served.scheduler.waiting and (served.scheduler.reasoning or served.scheduler.waiting > 190):
        prompts, began = served.scheduler.waiting, served.engine.clock.now
        served.scheduler.advance()
        decoding = served.scheduler.waiting == prompts
        seconds = served.engine.clock.now - began
        spent[decoding] += seconds
        runs[decoding] += 1
        since[decoding], since[not decoding] = since[decoding] + seconds, 0.0
        longest[decoding] = max(longest[decoding], since[decoding])
    assert runs[True] > 20
    assert longest[True] <= STALL + COSTS.step(4)  # decoding alone, while prompts wait
    assert longest[False] <= 4 * COSTS.prompts(1, 10) + COSTS.prompts(
        1, tokens
    )  # the first prompts, which fill the rows
    if tokens == 5:
        assert 0.3 < spent[True] / sum(spent.values()) < 0.75


def test_with_a_lane_prompts_keep_no_step_waiting_nor_steps_them() -> None:
    ends = {}
    for lane in (False, True):
        served = Served(pace=Pace(patient=False, prompts=8, rationales=8), lane=lane)
        written = [served.submit(SimulatedInput(10, 1.0, 20), "always") for _ in range(4)]
        while served.scheduler.decoded < 4:
            served.scheduler.advance()
        began = served.engine.clock.now
        prompt = served.submit(SimulatedInput(3000), "never")
        served.run()
        served.check_left_nothing()
        ends[lane] = [max(served.when[job.item.index] for job in jobs) - began for jobs in ([prompt], written)]
        assert served.scheduler.ran == pytest.approx(served.engine.clock.now)
    long, steps = COSTS.prompts(1, 3000), 22 * COSTS.step(4)  # the tokens that are left, and two markers
    assert ends[False] == pytest.approx([long, long + steps])
    assert ends[True] == pytest.approx([long, steps], abs=COSTS.step(4))


@pytest.mark.parametrize("patient", [False, True])
def test_with_a_lane_prompts_run_in_two_halves_at_once(patient: bool) -> None:
    served = Served(pace=Pace(patient=patient, prompts=8, rationales=8), lane=True)
    prompts = [served.submit(SimulatedInput(500), "never") for _ in range(8)]
    assert served.scheduler.advance()
    assert served.scheduler.waiting == 8
    assert served.scheduler.advance()
    assert served.scheduler.waiting == 4
    served.run()
    assert served.engine.clock.now == pytest.approx(COSTS.prompts(4, 500)) == pytest.approx(served.scheduler.ran)
    assert [value(job) for job in prompts] == list(range(8))
    assert served.scheduler.seconds["prefill"] == pytest.approx(2 * served.scheduler.ran)
    served.submit(SimulatedInput(500), "never")  # alone, it need not go there
    assert served.scheduler.advance()
    assert served.scheduler.waiting == 0


def test_prompts_that_run_beside_the_lane_s_keep_no_step_waiting_for_long() -> None:
    served = Served(pace=Pace(patient=False, prompts=8, rationales=4), lane=True)
    written = [served.submit(SimulatedInput(10, 1.0, 20), "always") for _ in range(4)]
    while served.scheduler.decoded < 4:
        served.scheduler.advance()
    steps = []
    written[0].wrote = lambda _: steps.append(served.engine.clock.now)
    prompts = [served.submit(SimulatedInput(300), "never") for _ in range(100)]
    served.run()
    gaps = [later - earlier - COSTS.step(4) for earlier, later in pairwise(steps)]
    assert len(gaps) == 21
    assert max(gaps) == pytest.approx(COSTS.prompts(2, 300))  # three would take longer than steps may make up for
    assert sum(served.when[job.item.index] < steps[-1] for job in prompts) > 30
    served.check_left_nothing()


def test_beside_steps_the_lane_takes_what_comes_and_only_what_it_leaves_behind_stops_them() -> None:
    served = Served(pace=Pace(patient=False, prompts=4, rationales=4), lane=True)
    for _ in range(4):
        served.submit(SimulatedInput(10, 1.0, 20), "always")
    while served.scheduler.decoded < 4:
        served.scheduler.advance()

    def after(prompts: int, reasoning: str = "never") -> int:
        for _ in range(prompts):
            served.submit(SimulatedInput(800), reasoning)
        served.scheduler.advance()
        served.scheduler.advance()
        return served.scheduler.waiting

    assert after(2) == 2  # both in the lane
    served.engine.clock.now += 1e-6
    assert after(1) == 3  # it came while they ran
    while served.scheduler.waiting:
        served.scheduler.advance()
    assert after(5) == 4  # one was left behind
    while served.scheduler.waiting:
        served.scheduler.advance()
    assert after(5, "always") == 5  # it could not be decoded yet
    served.run()
    served.check_left_nothing()


def test_prompts_in_the_lane_have_room_in_the_cache_that_no_others_take() -> None:
    served = Served(cache_tokens=70, lane=True)
    jobs = [served.submit(SimulatedInput(10, 1.0, 20), "always") for _ in range(4)]  # of 32 tokens each
    while served.scheduler.advance():
        assert served.scheduler.cache_tokens <= 70
    assert [value(job) for job in jobs] == [0.5, 1.5, 2.5, 3.5]
    served.check_left_nothing()


def test_between_the_steps_beside_prompts_others_come_and_what_has_passed_is_no_backlog() -> None:
    served = Served(pace=Pace(patient=False, prompts=4, rationales=4), lane=True)
    served.submit(SimulatedInput(500, 1.0, 20), "always")
    served.run()  # so that costs are known
    served.submit(SimulatedInput(10, 1.0, 20), "always")
    served.scheduler.advance()
    served.scheduler.advance()
    served.submit(SimulatedInput(500), "never")
    backlog = [served.scheduler.backlog_seconds]
    for _ in range(2):
        served.scheduler.advance()
        backlog.append(served.scheduler.backlog_seconds)
    assert served.scheduler.waiting == 1
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(backlog))
    served.submit(SimulatedInput(10), "never")
    assert served.scheduler.waiting == 2
    served.run()
    served.check_left_nothing()


def test_who_leaves_while_his_prompt_runs_is_let_go_and_one_that_failed_beside_him_is_tried_again() -> None:
    served = Served(pace=Pace(patient=False, prompts=4, rationales=4), lane=True)
    writing = served.submit(SimulatedInput(10, 1.0, 20), "always")
    served.scheduler.advance()
    served.scheduler.advance()
    others = [served.submit(SimulatedInput(500, 1.0, 5)) for _ in range(4)]
    writing.wrote = lambda _: served.scheduler.cancel(others[:1])
    failed = []

    def fail(numbers: list[int]) -> None:
        if len(numbers) > 1 and 1 in numbers:
            failed.append(numbers)
            raise BackendError("two are too many")

    served.engine.decoder.fails = fail
    served.run()
    assert failed == [[1, 2, 3, 4]]  # in the lane
    assert [job.error for job in others] == [None] * 4
    assert others[0].item.embedding_D is None
    assert [value(job) for job in others[1:]] == [2.5, 3.5, 4.5]
    assert all(served.ended[number] == 1 for number in range(5))
    served.check_left_nothing()


def test_steps_that_take_long_get_their_share_too() -> None:
    slow = SimulatedCosts(prompts=lambda *_: 0.3, step=lambda _: 0.1)
    served = Served(pace=Pace(patient=False, prompts=1, rationales=4), costs=slow)
    served.submit(SimulatedInput(10, 1.0, 20), "always")
    for _ in range(6):
        served.scheduler.advance()
    for _ in range(5):
        served.submit(SimulatedInput(10, 0.0), "never")
    waiting = []
    for _ in range(12):
        served.scheduler.advance()
        waiting.append(served.scheduler.waiting)
    assert waiting == [4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1]


def test_the_first_due_runs_first_and_priority_ages() -> None:
    served = Served(pace=Pace(patient=False, prompts=1))
    order = [
        served.submit(SimulatedInput(10), "never", priority=1),
        served.submit(SimulatedInput(10), "never"),
        served.submit(SimulatedInput(10), "never", deadline=5.0),
        served.submit(SimulatedInput(10), "never", priority=-1),
    ]
    served.engine.clock.now += 0.5
    served.submit(SimulatedInput(10), "never")
    served.run()
    assert served.order == [3, 2, 1, 4, 0]
    assert all(job.error is None for job in order)

    late = served.submit(SimulatedInput(10), "never", priority=1)
    for _ in range(3000):  # a stream of what comes first, as fast as it is served
        served.submit(SimulatedInput(500), "never")
        served.scheduler.advance()
        if served.ended[late.item.index]:
            break
    assert served.when[late.item.index] - late.arrived == pytest.approx(PATIENCE, abs=0.1)


def test_a_deadline_settles_for_the_direct_embedding_or_says_that_it_passed() -> None:
    served = Served()
    served.submit(SimulatedInput(10, 1.0, 20), "always")
    served.run()  # so that costs are known
    now = served.engine.clock.now
    in_time = served.submit(SimulatedInput(10, 1.0, 20), "always", deadline=now + 1.0)
    settled = served.submit(SimulatedInput(10, 1.0, 20), "always", deadline=now + 0.05)
    exact = served.submit(SimulatedInput(10, 1.0, 20), "always", deadline=now + 0.05, exact=True)
    served.run()
    assert value(in_time) == in_time.item.index + 0.5
    assert (value(settled), settled.item.degraded_by) == (settled.item.index, "deadline")
    assert served.when[settled.item.index] <= settled.deadline
    assert isinstance(exact.error, DeadlineError)
    served.submit(SimulatedInput(10))
    with pytest.raises(OverloadError, match="its deadline is in") as refused:
        served.submit(SimulatedInput(10), deadline=served.engine.clock.now + 1e-4)
    assert refused.value.reason == "deadline"
    served.run()
    alone = served.submit(SimulatedInput(10), deadline=served.engine.clock.now + 1e-4)
    served.run()
    assert isinstance(alone.error, DeadlineError)


def test_prompts_that_once_took_long_are_tried_again() -> None:
    """Where every input is refused by its deadline, no run would show that there is time again."""
    served = Served(costs=SimulatedCosts(lambda *_: 5.0, COSTS.step))
    served.submit(SimulatedInput(10), "never")
    served.run()
    served.engine.decoder._costs = COSTS  # pyright: ignore[reportPrivateUsage]
    jobs = []
    for _ in range(10):
        jobs.append(served.submit(SimulatedInput(10), "never", deadline=served.engine.clock.now + 0.3))
        served.run()
    assert all(job.error is None for job in jobs)


def test_what_once_took_long_is_tried_again() -> None:
    """Where nothing is decoded for want of time, nothing would show that there is time again."""
    served = Served()
    slow = SimulatedCosts(COSTS.prompts, lambda rows: 10 * COSTS.step(rows))
    served.engine.decoder._costs = slow  # pyright: ignore[reportPrivateUsage]
    for _ in range(3):
        served.submit(SimulatedInput(10, 1.0, 20), "always")
        served.run()
    served.engine.decoder._costs = COSTS  # pyright: ignore[reportPrivateUsage]
    jobs = []
    for _ in range(10):
        jobs.append(served.submit(SimulatedInput(10, 1.0, 20), "always", deadline=served.engine.clock.now + 0.3))
        served.run()
    assert all(job.error is None for job in jobs)
    assert all(job.item.reasoned is not None for job in jobs[-5:])


def test_a_rationale_gives_up_before_a_prompt_that_would_make_it_late() -> None:
    served = Served()
    served.submit(SimulatedInput(1000, 1.0, 20), "always")
    served.run()
    clock, jobs = served.engine.clock, []
    for arrival in clock.now + np.cumsum(np.random.default_rng(0).exponential(0.04, 300)):
        while clock.now < arrival:
            if not served.scheduler.advance():
                clock.now = arrival
        jobs.append(served.submit(SimulatedInput(1000, 1.0, 20), "always", deadline=clock.now + 0.15))
    served.run()
    assert all(job.error is None for job in jobs)
    assert {job.item.degraded_by for job in jobs} == {None, "deadline"}


def test_a_pause_of_the_machine_is_no_cost() -> None:
    mean = Mean()
    for value in (0.004, 0.004, 0.4, *[0.004] * 5):
        mean.add(value)
    assert mean.value < 0.008
    for _ in range(40):
        mean.add(0.04)
    assert mean.value > 0.035


def test_what_every_run_takes_is_told_from_what_its_size_takes() -> None:
    line = Line()
    for _ in range(5):
        line.add(10, 0.006)
    assert [line.fixed, line.unit] == pytest.approx([0.006, 0])
    for size in (40, 20, 80):
        line.add(size, 0.005 + 0.0001 * size)
    assert [line.fixed, line.unit] == pytest.approx([0.005, 0.0001])
    for size in (10, 100) * 200:
        line.add(size, 0.1 / size)  # which no such line is
    assert line.unit == 0
    assert line.fixed > 0


def test_a_larger_run_than_any_before_says_what_size_costs() -> None:
    line = Line()
    for _ in range(2):
        line.add(20, 0.0022)
    line.add(2400, 0.026)
    assert [line.fixed, line.unit] == pytest.approx([0.002, 1e-5])
    line.add(2400, 26)  # a machine that paused
    assert line.run(2400) < 0.08


def test_prompts_that_wait_cost_what_the_line_through_the_runs_says_or_the_mean_of_a_token() -> None:
    costs = Costs()
    costs.prefilled(1, 10, 0.1)
    costs.prefilled(1, 10, 0.1)
    assert costs.waiting(100) == pytest.approx(1.0)
    costs.prefilled(2, 40, 0.16)
    assert costs.waiting(100) == pytest.approx(0.08 + 100 * 0.002)
    assert costs.waiting(0) == 0
    assert costs.tokens.value == pytest.approx(40 / 3)
    assert costs.prompt(30) == pytest.approx((0.08 + 400 * 0.002) / 30)


def test_a_rationale_in_full_batches_costs_what_steps_of_fewer_rows_foretell() -> None:
    costs = Costs()
    costs.stepped(1, 0.011)
    costs.stepped(2, 0.012)
    costs.length.add(20)
    assert costs.rationale(32) == pytest.approx(20 * (0.01 + 32 * 0.001) / 32)


def test_prompts_run_together_while_padding_takes_less_than_another_run() -> None:
    served = Served(pace=Pace(patient=False, prompts=32))
    for tokens in (10, 20):
        served.submit(SimulatedInput(tokens), "never")
        served.run()
    assert served.scheduler.costs.padding == pytest.approx(200)
    batches: list[list[int]] = []
    served.engine.decoder.fails = batches.append
    lengths = [100, 40, 110, 300, 41, 42, 43, 90]
    for tokens in lengths:
        served.submit(SimulatedInput(tokens), "never")
        served.engine.clock.now += 1e-6
    served.run()
    found = [sorted(lengths[number - 2] for number in batch) for batch in batches]
    assert found == [[42, 43, 90, 100, 110], [40, 41], [300]]
    padded = [max(batch) * len(batch) - sum(batch) for batch in found]
    assert all(padding <= 200 for padding in padded)
    served.check_left_nothing()


def test_a_call_that_does_not_fit_is_refused_whole() -> None:
    served = Served(pace=Pace(patient=False, bounds=Bounds(rows=3, tokens=100)))
    served.submit(SimulatedInput(10))
    call = Call()
    with pytest.raises(OverloadError, match="1 rows wait and 3 more came, above the limit of 3"):
        served.scheduler.submit([served.job(SimulatedInput(1), call) for _ in range(3)])
    with pytest.raises(OverloadError, match="10 tokens wait and 95 more came"):
        served.submit(SimulatedInput(95))
    served.run()
    assert served.order == [0]


def test_a_call_before_which_prompts_of_too_many_seconds_wait_is_refused() -> None:
    served = Served(pace=Pace(patient=False, prompts=4, bounds=Bounds(seconds=0.05)))
    served.submit(SimulatedInput(10))
    served.run()  # from which costs are known: 0.21 ms a token
    for _ in range(24):
        served.submit(SimulatedInput(10), "never")
    with pytest.raises(OverloadError, match=r"0\.05\d s of prompts wait before it, above the limit of") as refused:
        served.submit(SimulatedInput(10), "never")
    assert refused.value.reason == "wait"
    assert 0 < refused.value.retry_after < 0.01
    served.run()
    served.submit(SimulatedInput(1000), "never")  # long itself, but nothing waits before it
    served.run()
    assert len(served.order) == 26


def offer(served: Served, rate: float, seconds: float, rng: np.random.Generator) -> list[Job]:
    """Submit a Poisson stream of inputs, of which all would like to reason by their threshold of 0.5."""
    jobs = []
    clock = served.engine.clock
    arrivals = clock.now + np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    for arrival in arrivals:
        while clock.now < arrival:
            if not served.scheduler.advance():
                clock.now = arrival
        jobs.append(served.submit(SimulatedInput(20, float(rng.uniform(0.5, 1)), 20), yields=True))
    return jobs


def test_load_takes_reasoning_from_the_lowest_scores_and_gives_it_back() -> None:
    served = Served(pace=Pace(patient=False, prompts=16, rationales=16), load=LoadGate([], patience=0.1))
    for _ in range(16):  # so that the costs of full batches are known
        served.submit(SimulatedInput(20, 1.0, 20), "always")
    served.run()
    rng = np.random.default_rng(0)
    reasoning = [job.item.reasoned is not None for job in offer(served, 40, 5, rng)]
    assert np.mean(reasoning) > 0.97
    overload = offer(served, 400, 10, rng)
    served.run()
    settled = overload[2000:]
    assert all(job.error is None for job in overload)
    took = [served.when[job.item.index] - job.arrived for job in settled if job.item.degraded_by == "load"]
    assert 0.3 < len(took) / len(settled) < 0.97
    assert np.percentile([served.when[job.item.index] - job.arrived for job in settled], 95) < 1.0
    kept = [job.item.score for job in settled if job.item.reasoned is not None]
    lost = [job.item.score for job in settled if job.item.degraded_by == "load"]
    assert np.mean(kept) > np.mean(lost) + 0.1
    after = offer(served, 40, 10, rng)
    served.run()
    assert np.mean([job.item.reasoned is not None for job in after[-200:]]) > 0.97


def test_a_jump_of_load_is_felt_for_a_moment_and_costs_no_more_reasoning_than_it_must() -> None:
    served = Served(pace=Pace(patient=False, prompts=16, rationales=16), load=LoadGate([], patience=0.1))
    for _ in range(16):
        served.submit(SimulatedInput(20, 1.0, 20), "always")
    served.run()
    rng = np.random.default_rng(0)
    offer(served, 40, 5, rng)
    jumped = offer(served, 400, 6, rng)
    served.run()
    took = [served.when[job.item.index] - job.arrived for job in jumped]
    assert np.percentile(took[:400], 95) < 0.6  # of which a rationale takes 0.15, and a prompt's batch little
    assert np.percentile(took[400:], 95) < 0.3
    reasoned = np.mean([job.item.reasoned is not None for job in jumped[400:]])
    prompts, rationale = 400 * COSTS.prompts(16, 20) / 16, 22 * COSTS.step(16) / 16
    assert 0.7 < reasoned * 400 * rationale / (UTILISATION - prompts) < 1
    assert all((job.item.threshold or 0) > job.item.score for job in jumped[400:] if job.item.degraded_by == "load")


def test_where_prompts_run_beside_steps_load_leaves_more_reasoning() -> None:
    shares = []
    for overlaps in (False, True):
        gate = LoadGate([], patience=0.5, overlaps=overlaps)
        for call in range(100):
            gate.arrived(call * 0.1, Work(1, 0, 1))
        gate.update(10.0, Work(), 0.02, 0.1)  # 0.2 of a second for prompts, and 1 for all rationales
        shares.append(gate.share)
    assert shares == pytest.approx([UTILISATION - 0.2, 1.0], abs=0.02)


def test_the_share_is_of_inputs_that_leave_it_to_the_server() -> None:
    """Prompts that never reason take their time, and no place among those that may."""
    shares = []
    for others in (0, 3):
        load = LoadGate([], patience=0.1)
        for call in range(400):
            load.arrived(call / 100, Work(prompts=1 + others, may=1))
        load.update(4.0, Work(), 1e-6, 0.02)
        shares.append(load.share)
    assert shares == pytest.approx([UTILISATION / 2] * 2, rel=0.02)


def test_the_threshold_lets_the_share_of_the_latest_scores_pass() -> None:
    point = CurvePoint(
        threshold=0.7,
        reasoning_rate=0.4,
        quality=0.9,
        quality_interval=(0.8, 1.0),
        worst_group=0.0,
        rationale_tokens=5.0,
        latency_ms=1.0,
    )
    load = LoadGate([point], patience=0.1)
    for call in range(200):
        load.arrived(call / 50, Work(prompts=1, may=1))  # of 50 a second, every other one may reason
    load.update(4.0, Work(), 0.0, UTILISATION / 25)
    assert load.share == pytest.approx(0.5, rel=0.02)
    assert load.threshold == 0.7  # by the curve
    for score in (*np.zeros(600), *np.linspace(0, 1, 512)):
        load.scored(float(score))
    load.update(4.0, Work(), 0.0, UTILISATION / 25)
    assert load.threshold == pytest.approx(0.5, abs=0.02)
    load.update(4.0, Work(must=50), 0.0, UTILISATION / 25)
    assert load.threshold > 1


def test_what_is_refused_counts_as_load() -> None:
    load = LoadGate([], patience=0.1)
    served = Served(pace=Pace(patient=False, bounds=Bounds(rows=0)), load=load)
    for call in range(400):
        served.engine.clock.now = call / 100
        with pytest.raises(OverloadError):
            served.submit(SimulatedInput(10, 0.9, 20), yields=True)
    load.update(4.0, Work(), 0.0, 0.034)
    assert load.share == pytest.approx(UTILISATION / 3.4, rel=0.02)


def test_what_does_not_yield_is_untouched_by_load() -> None:
    load = LoadGate([], patience=0.1)
    served = Served(pace=Pace(patient=False, prompts=16, rationales=16), load=load)
    jobs = [served.submit(SimulatedInput(20, 0.6, 20)) for _ in range(500)]
    served.run()
    assert all(job.item.reasoned is not None for job in jobs)


@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=SLOW, phases=[Phase.generate])
def test_served_results_are_those_of_encode(
    tiny_embedder: Embedder, mixed_inputs: list[Any], data: st.DataObject
) -> None:
    inputs = [*mixed_inputs, "one", "two words", "a text of some length that comes last"]
    ended: list[Job] = []
    rows = data.draw(st.integers(1, 5))
    assert tiny_embedder.paths.lane is not None
    paths = tiny_embedder.paths if data.draw(st.booleans()) else replace(tiny_embedder.paths, lane=None)
    scheduler = Scheduler(paths, Pace(patient=False, prompts=rows, rationales=rows), lambda: 0.0)
    calls = []
    for content in data.draw(st.permutations(inputs)):
        prepared = tiny_embedder.prepare([content], reasoning="always")
        jobs = tiny_embedder.jobs(prepared)
        for job in jobs:
            job.ended = ended.append
        scheduler.submit(jobs)
        calls.append((content, prepared))
        for _ in range(data.draw(st.integers(0, 6))):
            scheduler.advance()
    while scheduler.advance():
        pass
    assert len(set(ended)) == len(ended) == len(inputs)
    for content, prepared in calls:
        expected = tiny_embedder.encode_detailed([content], reasoning="always")
        found = tiny_embedder.result(prepared)
        assert found.details[0] is not None
        assert expected.details[0] is not None
        assert found.details[0].rationale_ids == expected.details[0].rationale_ids
        assert (found.embeddings @ expected.embeddings.T).item() >= 0.99999


def test_the_backlog_is_what_waits_times_what_it_cost_before() -> None:
    served = Served()
    served.submit(SimulatedInput(10, rationale=4), "always")
    served.run()
    scheduler, costs = served.scheduler, served.scheduler.costs
    assert scheduler.backlog_seconds == 0
    served.submit(SimulatedInput(20, rationale=4), "always")
    assert scheduler.backlog_seconds == pytest.approx(20 * costs.token.value) != 0
    scheduler.advance()  # its prompt has run, its rationale has not begun
    assert scheduler.backlog_seconds == pytest.approx(costs.rationale(scheduler.most)) != 0
    scheduler.advance()  # it is being written
    assert scheduler.backlog_seconds == pytest.approx(costs.rationale(scheduler.most) / 2)
