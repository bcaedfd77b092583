"""Watches an embedder at work, in a thread of its own. The server's scheduler does this for many inputs at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.results import Detail, Timings
from mmemb_deploy.routing.router import Route
from mmemb_deploy.serve.page.events import Ask, Ended, Event, Scored, Wrote

Emit = Callable[[Event], None]


class Watcher:
    """Embeds one input after another. The Service that schedules them takes its place."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._thread = ThreadPoolExecutor(1)

    async def watch(self, ask: Ask) -> AsyncGenerator[Event]:
        """Yield what happens; see `Watched`."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def emit(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        running = loop.run_in_executor(self._thread, self._run, ask, emit)
        running.add_done_callback(lambda _: events.put_nowait(None))
        while (event := await events.get()) is not None:
            yield event
        await running

    def _run(self, ask: Ask, emit: Emit) -> None:
        began = time.perf_counter()
        embedder = self.embedder
        prepared = embedder.prepare(ask.inputs, **ask.options)
        item, gate = prepared.items[0], embedder.manifest.gate
        started = time.perf_counter()
        fast = embedder.pipeline.fast_path.run([item.row], keep=embedder.reasons)
        direct_D, score, fast_path = fast.embeddings_BD[0], float(fast.scores_B[0]), time.perf_counter() - started
        threshold = None if gate is None else gate.threshold
        emit(Scored(score, threshold, direct_D, time.perf_counter() - began))
        if fast.cache is None or not prepared.policy.wants(score):
            detail = self._detail(score, item.row.length, [], Timings(item.preprocess, fast_path, 0.0), reasoned=False)
            emit(Ended(detail, direct_D, time.perf_counter() - began))
            return
        started = time.perf_counter()
        choose = _Spoken(embedder, emit)
        reasoned = embedder.pipeline.generator.generate(
            [fast.cache.take([0])], embedder.manifest.model.max_rationale_tokens, choose
        )[0]
        timings = Timings(item.preprocess, fast_path, time.perf_counter() - started)
        detail = self._detail(score, item.row.length, reasoned.token_ids, timings, reasoned=True)
        emit(Ended(detail, reasoned.embedding_D, time.perf_counter() - began))

    def _detail(self, score: float, length: int, ids: list[int], timings: Timings, *, reasoned: bool) -> Detail:
        return Detail(
            route=Route.REASON if reasoned else Route.FAST,
            gate_score=score,
            threshold=None,
            rationale=self.embedder.encoder.prompt.decode(ids) if reasoned else None,
            rationale_ids=tuple(ids),
            rationale_source="bundle" if reasoned else None,
            truncated=reasoned and len(ids) == self.embedder.manifest.model.max_rationale_tokens,
            fallback=None,
            degraded_by=None,
            prompt_tokens=length,
            timings=timings,
        )


class _Spoken:
    """Chooses the likeliest tokens of one row, and tells each that belongs to its rationale."""

    def __init__(self, embedder: Embedder, emit: Emit) -> None:
        self._prompt, self._emit = embedder.encoder.prompt, emit
        self._limit = embedder.manifest.model.max_rationale_tokens
        self._markers = frozenset(self._prompt.ids.values())
        self._ids: list[int] = []
        self._told = ""
        self._closed = False

    def __call__(self, logits_BW: Floats) -> Ints:
        chosen_B: Ints = logits_BW.argmax(axis=-1)
        token = int(chosen_B[0])
        self._closed |= token in self._markers or len(self._ids) == self._limit
        if not self._closed:
            self._ids.append(token)
            words = self._prompt.decode(self._ids)
            if not words.endswith("\N{REPLACEMENT CHARACTER}"):  # a character that the next token completes
                self._emit(Wrote(words[len(self._told) :], 1))
                self._told = words
        return chosen_B
