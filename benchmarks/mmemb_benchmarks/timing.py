"""Time: of a call, of an engine's stages, of the graphs in ONNX Runtime; and programs that run in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

from numpy.typing import NDArray

from mmemb_deploy.backends.protocol import Decoder, Engine, Extended, Prefilled, PromptGraphs, Session, Vision
from mmemb_deploy.inputs.preprocess import Ints, Pixels, VisionTables
from mmemb_deploy.inputs.rows import Batch

STAGES = ("preprocess", "vision", "prefill", "gate", "decode", "other")

Spent = defaultdict[str, float]
P = ParamSpec("P")
T = TypeVar("T")


def timed(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> tuple[T, float]:
    """Call once; return the result and the seconds that it took."""
    began = time.perf_counter()
    result = call(*arguments, **options)
    return result, time.perf_counter() - began


def run_fresh(code: str) -> Any:
    """Run a program in a process of its own, and return what its last line says in JSON."""
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def timed_engine(engine: Engine, spent: Spent) -> Engine:
    """Return the engine with every run added to `spent`, in seconds: vision, prefill, gate, and decode with its stack.

    The runtime's arrays are in host memory when a run returns, so it is complete then, on a GPU too. Of two runs at
    once both are added.
    """
    gate, beside = engine.gate, engine.beside
    return Engine(
        engine.name,
        _Vision(engine.vision, spent),
        _Decoder(engine.decoder, spent),
        None if gate is None else _Session(gate, "gate", spent),
        beside=None if beside is None else PromptGraphs(_Vision(beside.vision, spent), _Decoder(beside.decoder, spent)),
    )


class _Session:
    def __init__(self, session: Session, stage: str, spent: Spent) -> None:
        self._session, self._stage, self._spent = session, stage, spent

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found, seconds = timed(self._session.run, inputs)
        self._spent[self._stage] += seconds
        return found


class _Vision:
    def __init__(self, vision: Vision[Any], spent: Spent) -> None:
        self._vision, self._spent = vision, spent
        self.most_images = vision.most_images

    def run(self, pixels_NFPrc: Pixels, tables: VisionTables) -> list[Any]:
        found, seconds = timed(self._vision.run, pixels_NFPrc, tables)
        self._spent["vision"] += seconds
        return found

    def join(self, features: Sequence[Any]) -> Mapping[str, Any]:
        found, seconds = timed(self._vision.join, features)
        self._spent["vision"] += seconds
        return found


class _Decoder:
    def __init__(self, decoder: Decoder[Any], spent: Spent) -> None:
        self._decoder, self._spent = decoder, spent

    @property
    def most_rows(self) -> int:
        return self._decoder.most_rows

    def fits(self, rows: int, tokens: int, *, after: int | None) -> bool:
        return self._decoder.fits(rows, tokens, after=after)

    def prefill(self, batch: Batch, visual: Any, *, keep: bool = True) -> Prefilled[Any]:
        found, seconds = timed(self._decoder.prefill, batch, visual, keep=keep)
        self._spent["prefill"] += seconds
        return found

    @contextmanager
    def stack(self, *arguments: Any, **options: Any) -> Generator[Any]:
        with ExitStack() as stacked:
            cache, seconds = timed(stacked.enter_context, self._decoder.stack(*arguments, **options))
            self._spent["decode"] += seconds
            yield cache

    def extend(self, cache: Any, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]) -> Extended[Any]:
        found, seconds = timed(self._decoder.extend, cache, token_ids_BT, lengths_B, embedded)
        self._spent["decode"] += seconds
        return found


@contextmanager
def graph_seconds() -> Generator[list[float]]:
    """Collect the seconds of every run of a graph in ONNX Runtime."""
    import onnxruntime

    spent: list[float] = []
    session: Any = onnxruntime.InferenceSession
    originals = {name: getattr(session, name) for name in ("run", "run_with_iobinding")}

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            result, seconds = timed(original, *arguments, **options)
            spent.append(seconds)
            return result

        return run

    for name, original in originals.items():
        setattr(session, name, watched(original))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(session, name, original)
