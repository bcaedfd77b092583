"""The engine's side of a service: it takes messages, runs its scheduler, and tells what came of them.

It knows no event loop and no client: `mmemb_deploy.serve.thread` runs it in a thread of the service's process, and
`mmemb_deploy.serve.process` in a process of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from logging import getLogger

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import BackendError, MmembError, OverloadError
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.preparer import Prepared
from mmemb_deploy.routing.costs import Costs, Mean
from mmemb_deploy.routing.items import Item
from mmemb_deploy.routing.jobs import Bounds, Job, Pace
from mmemb_deploy.routing.load import LoadGate
from mmemb_deploy.routing.scheduler import Scheduler
from mmemb_deploy.serve.messages import Abandon, Cancel, End, Found, Message, Order, Report, State, Told

LOGGER = getLogger("mmemb_deploy.serve")
WAITING_TOKENS = 2**20  # of prompts that have not run
WAITING_BYTES = 2**30  # of decoded pixels in them
WARM_ROWS = 8  # of the batches from which the costs of full ones are known at first
SILENCE = 0.05  # seconds of work after which the state is told, whether anything ended or not


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a service's engine runs."""

    batch_size: int = 32  # rows that run together
    patience: float = 0.5  # seconds that a row may wait before load is high
    max_wait: float = math.inf  # seconds of prompts before a request, beyond which it is refused


@dataclass
class Running:
    """The jobs of an order, and how many of them have not ended."""

    jobs: list[Job]
    left: int


class Worker:
    """An embedder behind a scheduler: takes messages and runs, of one thread at a time."""

    def __init__(self, embedder: Embedder, limits: Limits) -> None:
        self.embedder = embedder
        gate = embedder.manifest.gate
        curve, overlaps = () if gate is None else gate.curve, embedder.paths.lane is not None
        self._load = LoadGate(curve, patience=limits.patience, overlaps=overlaps)
        bounds = Bounds(tokens=WAITING_TOKENS, media_bytes=WAITING_BYTES, seconds=limits.max_wait)
        pace = Pace(prompts=limits.batch_size, rationales=limits.batch_size, patient=False, bounds=bounds)
        self.scheduler = Scheduler(embedder.paths, pace, time.monotonic, load=self._load)
        self.told: list[tuple[int, Told]] = []
        self._orders: dict[int, Running] = {}  # by their numbers

    def warm(self) -> None:
        """Run each path, so that no request pays for what an engine does the first time, and costs are known."""
        modes: list[EncodeOptions] = [{"reasoning": "never"}]
        if self.embedder.reasons:
            modes.insert(0, {"reasoning": "always", "max_rationale_tokens": 2})
        for _ in range(2):
            self.scheduler.costs = Costs()  # without what the first runs cost
            for rows in (1, WARM_ROWS):
                for options in modes:
                    self.scheduler.submit(self.embedder.jobs(self.embedder.prepare(["one"] * rows, **options)))
                    while self.scheduler.advance():
                        pass
        self.scheduler.costs.length = Mean()

    def take(self, message: Message) -> None:
        """Do what a message says; what is wrong with an order is told as its end."""
        match message:
            case Order():
                try:
                    self._submit(message)
                except MmembError as error:
                    self.told.append((message.number, End(error)))
            case Cancel(number):
                if number in self._orders:
                    self._drop(number)
            case Abandon(error):
                self.scheduler.abandon(error)

    def report(self) -> Report:
        """Return what is to be told, once."""
        told, self.told = self.told, []
        scheduler, gate = self.scheduler, self.embedder.manifest.gate
        threshold = None if gate is None else max(gate.threshold, self._load.threshold)
        return Report(told, State(threshold, scheduler.backlog_seconds, scheduler.ran, self._figures(threshold)))

    def _submit(self, order: Order) -> None:
        embedder, options, gate = self.embedder, order.options, self.embedder.manifest.gate
        if order.on_overload == "reject" and gate is not None and self._load.threshold > gate.threshold:
            raise OverloadError(
                f"load lets only inputs of a score from {self._load.threshold:.2f} reason: ask again later, or let "
                "on_overload be 'direct' or 'wait'",
                reason="load",
                retry_after=1.0,
            )
        items = [Item(index, row, 0.0, given) for index, row, given in order.rows]
        prepared = Prepared(len(items), items, [], options, order.policy)
        embedder.check_fits(prepared)
        jobs = embedder.jobs(prepared)
        judged = options.reasoning == "auto" and options.threshold is None and options.reasoning_rate is None
        for job in jobs:
            job.priority, job.deadline = order.priority, order.deadline
            job.yields = judged and order.on_overload == "direct"
            job.exact = order.on_overload == "reject"
            job.ended = partial(self._ended, order.number)
            if order.watched:
                job.scored, job.wrote = partial(self._scored, order.number), partial(self._wrote, order.number)
        self.scheduler.submit(jobs)
        self._orders[order.number] = Running(jobs, len(jobs))

    def _scored(self, number: int, job: Job) -> None:
        assert job.item.embedding_D is not None
        self.told.append((number, Found(job.item.score, job.item.embedding_D)))

    def _wrote(self, number: int, job: Job) -> None:
        self.told.append((number, [] if job.writing is None else list(job.writing.token_ids)))

    def _ended(self, number: int, job: Job) -> None:
        if (order := self._orders.get(number)) is None:  # nobody waits for it
            return
        order.left -= 1
        if job.error is not None:
            self._drop(number)
            self.told.append((number, End(job.error)))
        elif not order.left:
            del self._orders[number]
            self.told.append((number, End(None, [job.item.outcome for job in order.jobs])))

    def _drop(self, number: int) -> None:
        """Forget an order, of which nothing more is told."""
        self.scheduler.cancel(self._orders.pop(number).jobs)

    def _figures(self, threshold: float | None) -> Mapping[str, float]:
        scheduler, paths = self.scheduler, self.embedder.paths
        features = paths.fast_path.vision.cache
        figures = {
            "num_requests_running": float(scheduler.decoded),
            "num_requests_waiting:prompt": float(scheduler.waiting),
            "num_requests_waiting:reasoning": float(scheduler.reasoning - scheduler.decoded),
            "mm_cache_queries": float(features.asked),
            "mm_cache_hits": float(features.found),
            "kv_cache_usage_perc": scheduler.cache_tokens * paths.token_bytes / paths.limits.cache_bytes,
        }
        if threshold is not None:
            figures["gate_threshold"] = threshold
        return figures | {f"engine_seconds:{run}": seconds for run, seconds in scheduler.seconds.items()}


def run(worker: Worker, receive: Callable[[bool], Sequence[Message | None]], send: Callable[[Report], None]) -> None:
    """Warm a worker up, then run what it is sent until that is None; end for good at the first defect.

    `receive` returns what has come, and waits for it where it is told so.
    """
    try:
        worker.warm()
        send(worker.report())
        busy, said, changed = False, time.monotonic(), False
        while True:
            for message in receive(not busy):
                if message is None:
                    send(worker.report())
                    return
                worker.take(message)
                changed = True
            busy = worker.scheduler.advance()
            now, changed = time.monotonic(), changed or busy
            if worker.told or (changed and (not busy or now - said > SILENCE)):
                send(worker.report())
                said, changed = now, False
    except (EOFError, ConnectionError):  # nobody is there to be served
        raise
    except Exception as error:
        LOGGER.critical("the engine ends: no request can be answered any more", exc_info=error)
        defect = f"the engine has stopped by a defect, {error!r}"
        worker.scheduler.abandon(BackendError(defect))
        send(Report(worker.told, defect=defect))
