"""An engine that computes nothing and takes its time on a virtual clock; the scheduler cannot tell it from a real one.

Axes: B rows, T tokens; embeddings and states have one value each, the input's number, and a half more once reasoned.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.protocol import Extended, Prefilled
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.bundle.manifest import BatchLimits
from mmemb_deploy.errors import BackendError
from mmemb_deploy.inputs.preprocess import Ints
from mmemb_deploy.inputs.prompts import END_THINK, PAD, PromptEncoder
from mmemb_deploy.inputs.rows import Batch, Row
from mmemb_deploy.preparer import row_encoder
from mmemb_deploy.routing.fast_path import FastPath, FastResult
from mmemb_deploy.routing.generation import Generator as Reasoning
from mmemb_deploy.routing.paths import Paths
from mmemb_deploy.routing.vision import VisionEncoder


@dataclass
class VirtualClock:
    """Seconds that pass only when something takes them."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@dataclass(frozen=True)
class SimulatedInput:
    """Tokens of its prompt, its gate score, and the tokens that it writes when it reasons."""

    tokens: int
    score: float = 0.0
    rationale: int = 0

    def row(self, number: int) -> Row:
        """Return what the scheduler reads of it; its first token is its number."""
        ids = np.full(self.tokens, number)
        return Row(ids, np.tile(np.arange(self.tokens), (3, 1)), (), np.zeros(self.tokens, np.int64))


@dataclass(frozen=True)
class SimulatedCosts:
    """Seconds: of a run of prompts by rows and padded tokens, and of a step by rows."""

    prompts: Callable[[int, int], float]
    step: Callable[[int], float]


@dataclass(eq=False)
class _Row:
    number: int
    written: int = 0


@dataclass(frozen=True)
class SimulatedCache:
    """Rows that know which input they are of."""

    rows: tuple[_Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> SimulatedCache:
        """Return some rows."""
        return SimulatedCache(tuple(self.rows[row] for row in rows))

    def split(self) -> list[SimulatedCache]:
        """Return every row as a cache of its own."""
        return [SimulatedCache((row,)) for row in self.rows]

    def joined(self, others: Sequence[SimulatedCache]) -> SimulatedCache:
        """Return these rows and those of others."""
        return SimulatedCache((*self.rows, *(row for other in others for row in other.rows)))


class SimulatedDecoder:
    """A decoder whose runs take time on a clock. `rows` are those that somebody holds.

    `fails` is told the inputs of a run, and of rows that ask for room to grow, and may raise.
    """

    def __init__(
        self,
        clock: VirtualClock,
        costs: SimulatedCosts,
        inputs: Sequence[SimulatedInput],
        closing: int,
        most_rows: int = sys.maxsize,
    ) -> None:
        self.most_rows = most_rows
        self.rows: WeakSet[_Row] = WeakSet()
        self.fails: Callable[[list[int]], None] = lambda _: None
        self._clock, self._costs, self._inputs, self._closing = clock, costs, inputs, closing

    def fits(self, rows: int, tokens: int, *, after: int | None) -> bool:
        """Return True."""
        del rows, tokens, after
        return True

    def prefill(self, batch: Batch, visual: Any, *, keep: bool = True) -> Prefilled[SimulatedCache]:
        """Run prompts."""
        del visual
        self._clock.now += self._costs.prompts(*batch.token_ids_BT.shape)
        numbers = batch.token_ids_BT[:, 0].tolist()
        self.fails(numbers)
        found = np.array(numbers, np.float32)[:, None]
        rows = tuple(_Row(number) for number in numbers)
        self.rows.update(rows)
        return Prefilled(found, found, SimulatedCache(rows) if keep else None)

    @contextmanager
    def stack(self, caches: Sequence[SimulatedCache], capacity: int) -> Generator[SimulatedCache]:
        """Give one cache of all rows."""
        del capacity
        first, *others = caches
        self.fails([row.number for cache in caches for row in cache.rows])
        yield first.joined(others)
        for cache in caches:
            for row in cache.rows:
                row.written = 0

    def extend(
        self, cache: SimulatedCache, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]
    ) -> Extended[SimulatedCache]:
        """Run a step."""
        del token_ids_BT, lengths_B
        self._clock.now += self._costs.step(len(cache))
        self.fails([row.number for row in cache.rows])
        chosen = []
        for row in cache.rows:
            chosen.append(1 if row.written < self._inputs[row.number].rationale else self._closing)
            row.written += 1
        embeddings = [np.array([cache.rows[place].number + 0.5], np.float32) for place in embedded]
        return Extended(np.array(chosen), embeddings, lambda: np.zeros((len(cache), 2), np.float32), cache)


@dataclass(frozen=True)
class SimulatedGate:
    """Scores by the input's number, which is its state."""

    inputs: Sequence[SimulatedInput]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the scores (B,)."""
        return {abi.SCORE: np.array([self.inputs[int(number)].score for number in inputs[abi.STATE][:, 0]])}


class _Blind:
    def encode(self, visuals: Sequence[Any]) -> dict[str, Any]:
        assert not visuals
        return {}


@dataclass(frozen=True)
class SimulatedRun:
    """Prompts that have run once a clock says so."""

    clock: VirtualClock
    ends: float
    outcome: FastResult | BackendError

    def done(self) -> bool:
        """Return whether that time has come."""
        return self.clock.now >= self.ends

    def result(self) -> tuple[FastResult, float]:
        """Let the time come. Raises BackendError if the run failed."""
        self.clock.now = max(self.clock.now, self.ends)
        if isinstance(self.outcome, BackendError):
            raise self.outcome
        return self.outcome, self.ends


@dataclass(frozen=True)
class SimulatedLane:
    """Where prompts take their time while others, and steps, take theirs."""

    clock: VirtualClock
    fast_path: FastPath

    def begin(self, rows: Sequence[Row], *, keep: bool, clock: Callable[[], float]) -> SimulatedRun:
        """Let rows' prompts run; `clock` is the lane's own."""
        assert clock is self.clock
        began = self.clock.now
        outcome: FastResult | BackendError
        try:
            outcome = self.fast_path.run(rows, keep=keep)
        except BackendError as error:
            outcome = error
        ends, self.clock.now = self.clock.now, began
        return SimulatedRun(self.clock, ends, outcome)


@dataclass
class SimulatedEngine:
    """A bundle's paths over inputs that are known by number; with a `lane`, prompts run there too."""

    inputs: Sequence[SimulatedInput]
    costs: SimulatedCosts
    cache_tokens: float = math.inf
    most_rows: int = sys.maxsize
    tokens: int = 8192  # of prompts that run together, padding included
    lane: bool = False
    clock: VirtualClock = field(default_factory=VirtualClock)

    def __post_init__(self) -> None:
        prompt = _prompt()
        self.decoder = SimulatedDecoder(self.clock, self.costs, self.inputs, prompt.ids[END_THINK], self.most_rows)
        vision = cast("VisionEncoder", _Blind())
        most = sys.maxsize if self.cache_tokens == math.inf else int(self.cache_tokens)
        limits = BatchLimits(row_tokens=sys.maxsize, tokens=self.tokens, patches=1, cache_bytes=most)
        fast_path = FastPath(vision, self.decoder, SimulatedGate(self.inputs), prompt.ids[PAD])
        lane = SimulatedLane(self.clock, fast_path) if self.lane else None
        self.paths = Paths(fast_path, Reasoning(self.decoder, prompt), limits, token_bytes=1, lane=lane)


@functools.cache
def _prompt() -> PromptEncoder:
    return row_encoder(Bundle.open(NANO)).prompt
