"""A step of one token of some rows: what it is bound to, and which of its values the device does not hold already.

Axis P: rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmemb_deploy.backends.device import Part, Wanted, Workspace, aligned
from mmemb_deploy.bundle import abi
from mmemb_deploy.inputs.preprocess import Ints


@dataclass(frozen=True)
class Bound:
    """What starts a run, where its own inputs lie, and its outputs; without the cache."""

    run: Callable[[], None]
    inputs: Mapping[str, int]
    outputs: Mapping[str, Wanted]


class StepValues:
    """What a step of P rows reads of each, int64: in `whole`, of which the others are parts."""

    def __init__(self, rows: int) -> None:
        pitch, three = aligned(8 * rows) // 8, aligned(24 * rows) // 8
        self.whole: Ints = np.zeros(3 * pitch + three, np.int64)
        self.starting = 0, pitch, pitch + three, 2 * pitch + three  # where each part does, as a tensor may
        tokens, positions, starts, lasts = self.starting
        self.tokens_P = self.whole[tokens : tokens + rows]
        self.positions_3P = self.whole[positions : positions + 3 * rows].reshape(3, rows)  # time, height and width
        self.starts_P = self.whole[starts : starts + rows]  # how many tokens are in the cache
        self.lasts_P = self.whole[lasts : lasts + rows]  # 0 for a row that gets a token, -1 for one that does not
        self.lasts_P[:] = -1


class StepInputs:
    """What the device holds of a step's values, and what is to be sent; `workspace` keeps the other inputs."""

    def __init__(self, workspace: Workspace, rows: int) -> None:
        self.held, self.wanted = StepValues(rows), StepValues(rows)
        self._workspace = workspace
        self._memory = workspace.device.allocate(self.held.whole.nbytes)
        names = abi.TOKEN_IDS, abi.POSITION_IDS, abi.START, abi.LAST
        for name, place, lines in zip(names, self.held.starting, (1, 3, 1, 1), strict=True):
            workspace.place(name, Part(self._memory, 8 * place, 8 * lines * rows))

    def send(self) -> None:
        """Let the device hold what is wanted."""
        self._workspace.device.upload(self.wanted.whole, self._memory.address)
        self.held, self.wanted = self.wanted, self.held


class Step:
    """A step of one token of some rows, bound to its memory; it knows what the device holds, and sends the rest."""

    def __init__(self, bound: Bound, start: Callable[[], None], inputs: StepInputs, *, feeds_back: bool) -> None:
        self.outputs, self.start, self.settled = bound.outputs, start, False
        self._inputs, self._feeds_back = inputs, feeds_back

    def feed(self, places: Ints, token_ids: Ints, positions: Sequence[int], starts: Sequence[int]) -> None:
        """Put a token in the places of some rows; the others, which begin at `starts` too, get none."""
        held, wanted = self._inputs.held, self._inputs.wanted
        wanted.whole[:] = held.whole
        wanted.tokens_P[places] = token_ids
        wanted.positions_3P[:, places] = positions
        wanted.starts_P[:] = starts
        wanted.lasts_P[:] = -1
        wanted.lasts_P[places] = 0
        if not (self._feeds_back and np.array_equal(wanted.whole, held.whole)):
            self._inputs.send()

    def advance(self, next_token_P: Ints) -> None:
        """Note what the step has fed to the next one."""
        if self._feeds_back:
            held = self._inputs.held
            held.tokens_P[:] = next_token_P
            held.positions_3P[:] += 1
            held.starts_P[:] += held.lasts_P + 1
