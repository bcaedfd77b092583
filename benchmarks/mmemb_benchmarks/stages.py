"""An engine whose graphs are timed: seconds by stage, as a call of `encode` spends them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from numpy.typing import NDArray

from mmemb_deploy.backends.protocol import Decoder, Engine, Extended, Prefilled, Session
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.rows import Batch

STAGES = ("preprocess", "vision", "prefill", "gate", "decode", "other")

Spent = defaultdict[str, float]
T = TypeVar("T")


def timed_engine(engine: Engine, spent: Spent) -> Engine:
    """Return the engine with every run added to `spent`, in seconds: vision, prefill, gate, and decode with its stack.

    The runtime's arrays are in host memory when a run returns, so it is complete then, on a GPU too.
    """
    gate = None if engine.gate is None else _Session(engine.gate, "gate", spent)
    return Engine(engine.name, _Session(engine.vision, "vision", spent), _Decoder(engine.decoder, spent), gate)


class _Session:
    def __init__(self, session: Session, stage: str, spent: Spent) -> None:
        self._session, self._stage, self._spent = session, stage, spent

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return _timed(self._spent, self._stage, lambda: self._session.run(inputs))


class _Decoder:
    def __init__(self, decoder: Decoder[Any], spent: Spent) -> None:
        self._decoder, self._spent = decoder, spent

    def prefill(self, batch: Batch, visual_tokens_VD: Floats, deepstack_LVD: Floats) -> Prefilled[Any]:
        return _timed(self._spent, "prefill", lambda: self._decoder.prefill(batch, visual_tokens_VD, deepstack_LVD))

    @contextmanager
    def stack(self, caches: Sequence[Any], capacity: int) -> Generator[Any]:
        stacked = self._decoder.stack(caches, capacity)
        yield _timed(self._spent, "decode", stacked.__enter__)
        stacked.__exit__(None, None, None)

    def extend(self, cache: Any, token_ids_BT: Ints, lengths_B: Ints) -> Extended[Any]:
        return _timed(self._spent, "decode", lambda: self._decoder.extend(cache, token_ids_BT, lengths_B))


def _timed(spent: Spent, stage: str, run: Callable[[], T]) -> T:
    began = time.perf_counter()
    result = run()
    spent[stage] += time.perf_counter() - began
    return result
