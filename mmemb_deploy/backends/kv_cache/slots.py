"""A decoder whose KV cache lies in slots of a pool and is written in place, wherever the backend computes.

A step of one token runs over rows that lie side by side, by an engine bound once for each number of them; what it
feeds to the next step stays on the device. Where a row costs as much as its share of the work (a CPU), exactly the rows
at hand run, after gaps are filled; where it costs next to nothing (a GPU), all rows up to the last run, padded to a
power of two, and none is moved: those that wait get a token written behind theirs, which the next one overwrites.

Axes as in `protocol`; P rows of a step, R slots of a row, W words of the vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from logging import getLogger
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.device import Device, DeviceArray, DeviceEngine, Plane, RecordError, Wanted, Workspace
from mmemb_deploy.backends.kv_cache.pool import BUCKET, FEWEST, Layout, Pool, Row
from mmemb_deploy.backends.kv_cache.step import Bound, Step, StepInputs
from mmemb_deploy.backends.nvtx import marked
from mmemb_deploy.backends.protocol import Extended, Prefilled
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.bundle.precision import value_bytes
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_deploy.inputs.rows import Batch

LOGGER = getLogger("mmemb_deploy")
Visual = Mapping[str, NDArray[Any] | DeviceArray]  # VISUAL_TOKENS and DEEPSTACK, by name


@dataclass(frozen=True)
class SlotCache:
    """Rows of a pool, in an order; taking, splitting and joining them copies nothing."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> SlotCache:
        """Return some rows."""
        return SlotCache(tuple(self.rows[row] for row in rows))

    def split(self) -> list[SlotCache]:
        """Return every row as a cache of its own."""
        return [SlotCache((row,)) for row in self.rows]

    def joined(self, others: Sequence[SlotCache]) -> SlotCache:
        """Return these rows and those of others."""
        return SlotCache((*self.rows, *(row for other in others for row in other.rows)))


@dataclass(frozen=True)
class Places:
    """How a backend lays out rows.

    Fixed rows and slots are those that engines were built for; None lets the pool grow. `padded` steps run all rows up
    to the last, and are recorded; others run exactly their rows. `chunk` bounds the tokens of a row that follow in one
    run, and `continues` says whether prompts of several rows may go on from a prefix. Of engines that look at a part of
    a row's slots, `windows` are how many slots that may be, the fewest first. With `part`, prompts leave the pool as
    they end, and another decoder of the bundle goes on from them.
    """

    rows: int | None = None
    slots: int | None = None
    padded: bool = False
    chunk: int | None = None
    continues: bool = True
    windows: tuple[int, ...] = ()
    part: bool = False


def windows(slots: int) -> tuple[int, ...]:
    """Return the sizes of windows on so many slots: each has about a quarter of the next, the first 256 at least."""
    found = [slots]
    while found[0] // 4 >= 4 * BUCKET:
        found.insert(0, -(-found[0] // 4 // BUCKET) * BUCKET)
    return tuple(found)


class SlotDecoder:
    """Runs a bundle's decoder graphs: `direct` where nothing follows, else `embedder`, then `generator`."""

    def __init__(self, device: Device, graphs: Mapping[str, DeviceEngine], manifest: Manifest, places: Places) -> None:
        model = manifest.model
        self._device, self._model, self._places = device, model, places
        self._direct, self._embedder = graphs.get(abi.DIRECT), graphs.get(abi.EMBEDDER)
        self._generator = graphs.get(abi.GENERATOR)
        self._past, self._present = tuple(abi.past_names(model.layers)), tuple(abi.present_names(model.layers))
        self._prompts, self._results = Workspace(device), Workspace(device)  # results of steps
        self._bound: dict[tuple[int, ...], Step] = {}  # by the pool's moves, rows and window
        made = () if self._generator is None else self._generator.facts.outputs
        names = {tensor.name for tensor in made}
        self._fed_back = {made: fed for made, fed in abi.FED_BACK.items() if made in names}
        self._tells_next = abi.NEXT_TOKEN if self._fed_back else abi.LOGITS
        self.notes: list[str] = []
        if self._embedder is not None:
            layout = Layout(len(self._past), model.kv_heads, model.head_dim * value_bytes(manifest.compute))
            rows, slots = places.rows or FEWEST, places.slots or BUCKET
            self.pool = Pool(device, layout, rows, slots, grows=places.rows is None)

    @property
    def most_rows(self) -> int:
        """Most rows of a step."""
        return self._places.rows or sys.maxsize

    def fits(self, rows: int, tokens: int, *, after: int | None) -> bool:
        """Return whether prompts run at once, and may be followed; see `protocol.Decoder`."""
        shapes, places = {abi.TOKEN_IDS: (rows, tokens), abi.POSITION_IDS: (3, rows, tokens)}, self._places
        if self._direct is not None and (after is None or self._embedder is None):
            return self._direct.takes(shapes)
        assert self._embedder is not None
        if places.slots is not None and tokens + (after or 0) + (places.chunk or 0) > places.slots:
            return False
        return rows <= self.most_rows and self._embedder.takes(shapes)

    def prefill(self, batch: Batch, visual: Visual, *, keep: bool = True) -> Prefilled[SlotCache]:
        """Run prompts. Padding follows a row's own tokens, which therefore never see it."""
        with self._device.lock, marked("prefill"):
            if self._direct is not None and not (keep and self._embedder):
                return self._run(self._direct, _prompt(batch, visual, 0), None)
            return self._prefill(batch, visual)

    def _prefill(self, batch: Batch, visual: Visual) -> Prefilled[SlotCache]:
        assert self._embedder is not None
        count, tokens = batch.token_ids_BT.shape
        self.pool.ensure(tokens + self._model.max_rationale_tokens + PATH_MARKERS)
        prefix = batch.token_ids_BT[0, : batch.prefix].tobytes()
        rows = self.pool.lease(count, prefix)
        known = batch.prefix and self.pool.keeps(rows, prefix) and (count == 1 or self._places.continues)
        start = batch.prefix if known else 0
        arrays = _prompt(batch, visual, start) | {abi.START: np.full(count, start, np.int64)}
        made = self._run(self._embedder, arrays, rows[0].index)
        self.pool.keep(rows, prefix, batch.prefix)
        for row, length, position in zip(rows, batch.last_B + 1, batch.next_position_B, strict=True):
            row.length, row.position = int(length), int(position)
        if self._places.part:
            self.pool.part(rows)
        return replace(made, cache=SlotCache(tuple(rows)))

    def _run(self, engine: DeviceEngine, arrays: Mapping[str, Any], first: int | None) -> Prefilled[SlotCache]:
        """Run prompts in rows from `first` on, or without a cache."""
        window = None
        if first is not None:
            window = self._window(int(arrays[abi.START].max()) + arrays[abi.TOKEN_IDS].shape[1])
        bound = self._bind(engine, arrays, first, window, self._prompts)
        bound.run()
        wanted = [bound.outputs[name] for name in (abi.EMBEDDING, abi.STATE)]
        embeddings_BD, states_BD = self._device.download(wanted)
        return Prefilled(embeddings_BD, states_BD, None)

    def _bind(
        self,
        engine: DeviceEngine,
        arrays: Mapping[str, Any],
        first: int | None,
        window: int | None,
        inputs: Workspace,
        outputs: Workspace | None = None,
    ) -> Bound:
        """Bind an engine to inputs that are uploaded, and to the cache of rows from `first` on, of which it looks at
        `window` slots.

        With `outputs`, where its results go, the inputs' workspace is its own, and it is started again and again.
        """
        names = [tensor.name for tensor in engine.facts.inputs if tensor.name not in self._past]
        if window is not None:
            arrays = {**arrays, abi.WINDOW: np.arange(window)}
        shapes, addresses = inputs.upload({name: arrays[name] for name in names})
        made = (outputs or inputs).outputs(engine.facts, shapes, without=frozenset(self._present))
        addresses |= {name: each.address for name, each in made.items()}
        if first is not None:
            model, cached = self._model, self.pool.addresses(first)
            rows = len(arrays[abi.TOKEN_IDS])
            shapes |= dict.fromkeys(self._past, (rows, model.kv_heads, self.pool.slots, model.head_dim))
            addresses |= dict(zip(self._past, cached, strict=True)) | dict(zip(self._present, cached, strict=True))
        run = engine.bind(shapes, addresses, again=outputs is not None)
        return Bound(run, {name: addresses[name] for name in names}, made)

    @contextmanager
    def stack(self, caches: Sequence[SlotCache], capacity: int) -> Generator[SlotCache]:
        """Give one cache of all rows, which are as they were when it ends."""
        first, *others = caches
        rows = first.joined(others).rows
        assert len(set(map(id, rows))) == len(rows), "a row cannot be extended twice at once"
        before = [(row, row.length, row.position) for row in rows]
        with self._device.lock:
            self.pool.ensure(max(row.length for row in rows) + capacity)
        try:
            yield SlotCache(rows)
        finally:
            for row, length, position in before:
                row.length, row.position = length, position

    def extend(
        self, cache: SlotCache, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]
    ) -> Extended[SlotCache]:
        """Run new tokens after a cache, whose rows grow by them."""
        with self._device.lock, marked("decode"):
            self.pool.bring_in(cache.rows)
            if token_ids_BT.shape[1] == 1:
                return self._step(cache, token_ids_BT, embedded)
            return self._follow(cache, token_ids_BT, lengths_B, embedded)

    def _step(self, cache: SlotCache, token_ids_B1: Ints, embedded: Sequence[int]) -> Extended[SlotCache]:
        count = self._count(cache.rows)
        window = self._window(1 + max(row.length for row in cache.rows))
        step = self._bound.get((self.pool.moves, count, window)) or self._bind_step(count, window)
        places = np.array([row.index for row in cache.rows])
        step.feed(places, token_ids_B1[:, 0], [row.position for row in cache.rows], self._starts(count))
        self._run_step(step)
        embeddings = [row_of(step.outputs[abi.EMBEDDING], int(places[row])) for row in embedded]
        next_P, *found = self._device.download([step.outputs[self._tells_next], *embeddings])
        next_P = self._next(next_P)
        step.advance(next_P)
        for row in cache.rows:
            row.length, row.position = row.length + 1, row.position + 1

        def logits() -> Floats:
            wanted = [row_of(step.outputs[abi.LOGITS], int(place)) for place in places]
            return np.stack(self._device.download(wanted))

        return Extended(next_P[places], found, logits, cache)

    def _count(self, rows: Sequence[Row]) -> int:
        """Return how many rows run, the first of the pool, so that these are among them."""
        if not self._places.padded:
            self.pool.gather(rows)
            return len(rows)
        return min(1 << max(row.index for row in rows).bit_length(), self.pool.rows)

    def _starts(self, count: int) -> list[int]:
        return [self.pool.written(row) for row in range(count)]

    def _window(self, slots: int) -> int:
        """Return the size of the smallest window that shows so many slots."""
        return next((size for size in self._places.windows if size >= slots), self.pool.slots)

    def _bind_step(self, count: int, window: int) -> Step:
        """Bind a step of so many rows, and record it where that can be done."""
        assert self._generator is not None
        for key in list(self._bound):
            if key[0] != self.pool.moves:
                del self._bound[key]
        shapes = {name: array.shape for name, array in self._blank(self.pool.rows, 1).items()}
        facts = self._generator.facts  # room for all first: memory that grows would move from under what is bound
        self._results.outputs(facts, shapes, without=frozenset(self._present))
        own = Workspace(self._device)
        inputs = StepInputs(own, count)
        bound = self._bind(self._generator, self._blank(count, 1), 0, window, own, self._results)

        fed_back = []
        for made, fed in self._fed_back.items():
            nbytes = 8 * math.prod(bound.outputs[made].shape)
            fed_back.append((Plane(bound.outputs[made].address, nbytes), Plane(bound.inputs[fed], nbytes), nbytes, 1))

        def start() -> None:
            bound.run()
            for copy in fed_back:
                self._device.copy(*copy)

        step = Step(bound, start, inputs, feeds_back=bool(self._fed_back))
        self._bound[self.pool.moves, count, window] = step
        return step

    def warm_up(self) -> None:
        """Run and record a step of every padded number of rows and window, before inputs wait for one."""
        if self._generator is None or self._places.rows is None:
            return
        counts = [1 << power for power in range(self.pool.rows.bit_length()) if 1 << power < self.pool.rows]
        with self._device.lock:
            for count, window in product((*counts, self.pool.rows), self._places.windows or (self.pool.slots,)):
                step = self._bind_step(count, window)
                step.feed(np.array([], np.int64), np.array([], np.int64), [], self._starts(count))
                self._run_step(step)
                (next_P,) = self._device.download([step.outputs[self._tells_next]])
                step.advance(self._next(next_P))

    def _run_step(self, step: Step) -> None:
        """Start a step; what ran once, and so has settled, is recorded for the times after."""
        step.start()
        if self._places.padded and not step.settled:
            step.settled = True
            try:
                step.start = self._device.record(step.start)
            except RecordError as error:
                rows = step.outputs[abi.EMBEDDING].shape[0]
                self.notes.append(f"steps of {rows} rows run without a CUDA graph: {error}")
                if self._places.rows is None:  # it was not warmed up, and its notes were read when it was loaded
                    LOGGER.warning(self.notes[-1])

    def _follow(
        self, cache: SlotCache, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]
    ) -> Extended[SlotCache]:
        """Run several tokens of every row, in chunks; each row's results come from the chunk of its last token."""
        if not self._places.continues and len(cache) > 1:
            return self._follow_alone(cache, token_ids_BT, lengths_B, embedded)
        total = token_ids_BT.shape[1]
        chunk = min(self._places.chunk or total, total)
        next_B: Ints = np.zeros(len(cache), np.int64)
        embeddings_BD: Floats = np.zeros((len(cache), self._model.hidden_size), np.float32)
        logits_BW: Floats = np.zeros((len(cache), self._model.vocabulary_size), np.float32)

        def run(begin: int) -> tuple[Ints, Callable[[], Floats]]:
            ids_BT = token_ids_BT[:, begin : begin + chunk]
            new_B = (lengths_B - begin).clip(0, ids_BT.shape[1])
            ends = np.flatnonzero((new_B > 0) & (lengths_B <= begin + chunk))
            next_E, embeddings_ED, fetch = self._follow_chunk(cache.rows, ids_BT, new_B, ends)
            if len(ends):
                next_B[ends], embeddings_BD[ends] = next_E, embeddings_ED
            return ends, fetch

        *earlier, last = range(0, total, chunk)
        for begin in earlier:
            ends, fetch = run(begin)
            if len(ends):  # the next chunk's will lie where these do
                logits_BW[ends] = fetch()
        ends, fetch = run(last)

        def logits() -> Floats:
            logits_BW[ends] = fetch()
            return logits_BW

        return Extended(next_B, [embeddings_BD[row] for row in embedded], logits, cache)

    def _follow_alone(
        self, cache: SlotCache, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]
    ) -> Extended[SlotCache]:
        """Run every row's tokens by themselves."""
        made = []
        for place, one in enumerate(cache.split()):
            ids_1T = token_ids_BT[place : place + 1, : lengths_B[place]]
            row = self.extend(one, ids_1T, lengths_B[place : place + 1], [0])
            made.append((row.next_token_B, row.embeddings[0], row.logits()))
        next_tokens, embeddings, logits = zip(*made, strict=True)
        logits_BW = np.concatenate(logits)
        return Extended(np.concatenate(next_tokens), [embeddings[row] for row in embedded], lambda: logits_BW, cache)

    def _follow_chunk(
        self, rows: Sequence[Row], token_ids_BT: Ints, new_B: Ints, ends: Ints
    ) -> tuple[Ints, Floats, Callable[[], Floats]]:
        """Run a chunk; return next tokens (ends,), embeddings, and what fetches logits, of the rows that end in it."""
        assert self._generator is not None
        count = self._count(rows)
        places = np.array([row.index for row in rows])
        new = token_ids_BT.shape[1]
        starts = self._starts(count)
        self.pool.ensure(max(starts) + new)
        inputs = self._blank(count, new) | {abi.START: np.array(starts)}
        inputs[abi.TOKEN_IDS][places] = token_ids_BT
        positions_B = np.array([row.position for row in rows])
        inputs[abi.POSITION_IDS][:, places] = positions_B[:, None] + np.arange(new)
        inputs[abi.LAST][places] = new_B - 1
        window = self._window(new + max(row.length for row in rows))
        bound = self._bind(self._generator, inputs, 0, window, self._prompts)
        bound.run()

        def wanted(name: str) -> list[Wanted]:
            return [row_of(bound.outputs[name], place) for place in places[ends].tolist()]

        found = self._device.download([*wanted(self._tells_next), *wanted(abi.EMBEDDING)])
        for row, more in zip(rows, new_B.tolist(), strict=True):
            row.length, row.position = row.length + more, row.position + more
        told, embeddings = found[: len(ends)], found[len(ends) :]
        next_E = self._next(np.stack(told)) if told else np.zeros(0, np.int64)
        return next_E, np.array(embeddings), lambda: np.stack(self._device.download(wanted(abi.LOGITS)))

    def _next(self, told: NDArray[Any]) -> Ints:
        """Return the likeliest next tokens, of what tells them."""
        likeliest: Ints = told[:, 0] if self._fed_back else told.argmax(axis=-1)
        return likeliest

    def _blank(self, rows: int, new: int) -> dict[str, NDArray[Any]]:
        """Return the inputs of tokens that show nothing, of rows that have no new one."""
        row_1D = np.zeros((1, self._model.hidden_size), np.float32)
        return {
            abi.TOKEN_IDS: np.zeros((rows, new), np.int64),
            abi.POSITION_IDS: np.zeros((3, rows, new), np.int64),
            abi.START: np.zeros(rows, np.int64),
            abi.LAST: np.full(rows, -1, np.int64),
            abi.VISUAL_INDEX: np.zeros((rows, new), np.int64),
            abi.VISUAL_TOKENS: row_1D,
            abi.DEEPSTACK: np.zeros((self._model.deepstack_levels, *row_1D.shape), np.float32),
        }


def row_of(whole: Wanted, row: int) -> Wanted:
    """Return one row of an array on the device."""
    nbytes = np.dtype(whole.dtype).itemsize * math.prod(whole.shape[1:])
    return Wanted(whole.address + row * nbytes, whole.shape[1:], whole.dtype)


def _prompt(batch: Batch, visual: Visual, start: int) -> dict[str, Any]:
    """Return what a decoder reads of prompts from `start` on, but for the cache."""
    return {
        abi.TOKEN_IDS: batch.token_ids_BT[:, start:],
        abi.POSITION_IDS: batch.position_ids_3BT[:, :, start:],
        abi.LAST: batch.last_B - start,
        abi.VISUAL_INDEX: batch.visual_index_BT[:, start:],
        **visual,
    }
