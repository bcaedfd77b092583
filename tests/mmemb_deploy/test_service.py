"""The service: many requests at once through one scheduler, in one engine thread."""

import asyncio
import gc
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmemb_deploy import BackendError, DeadlineError, Embedder, InputError, OptionError, OverloadError
from mmemb_deploy.backends import host_device
from mmemb_deploy.backends.host_device import HostMemory
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.preparer import Prepared, Preparer
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.serve.ask import Ask, Ended, Scored, Wrote
from mmemb_deploy.serve.messages import End, Order
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.thread import EngineThread
from mmemb_deploy.serve.worker import Limits, Worker


def serving(
    embedder: Embedder, use: Callable[[Service, Worker], Awaitable[None]], most: int = 4096, **settings: Any
) -> None:
    """Start a service, use it, drain it."""

    async def run() -> None:
        worker = Worker(embedder, Limits(**settings))
        service = Service(embedder, EngineThread(worker), max_waiting_rows=most)
        await service.start()
        assert service.ready
        try:
            await use(service, worker)
        finally:
            await service.drain(10)
        assert not service.ready
        assert worker.scheduler.waiting == worker.scheduler.reasoning == 0

    asyncio.run(run())


def ask(*inputs: Any, reasoning: str = "auto", **more: Any) -> Ask:
    return Ask(inputs=inputs, options={"reasoning": reasoning}, **more)


def test_many_requests_at_once_get_what_encode_gives(tiny_embedder: Embedder, mixed_inputs: list[Any]) -> None:
    asked: list[tuple[list[Any], EncodeOptions]] = [
        ([each], {"reasoning": reasoning}) for each in mixed_inputs for reasoning in ("never", "auto", "always")
    ]
    asked.append((mixed_inputs, {"reasoning_rate": 0.5}))
    asked.append((mixed_inputs[:2], {"truncate_dim": tiny_embedder.dim}))

    async def use(service: Service, __: Worker) -> None:
        answers = await asyncio.gather(*(service.embed(Ask(inputs=inputs, options=how)) for inputs, how in asked))
        for (inputs, how), answer in zip(asked, answers, strict=True):
            expected = tiny_embedder.encode_detailed(inputs, **how)
            assert (answer.embeddings * expected.embeddings).sum(axis=1).min() >= 0.99999
            for found, each in zip(answer.details, expected.details, strict=True):
                assert found is not None
                assert each is not None
                assert (found.route, found.rationale_ids) == (each.route, each.rationale_ids)

    serving(tiny_embedder, use, batch_size=4)


def test_a_watched_input_tells_its_score_its_words_and_its_end() -> None:
    embedder, text = Embedder.load(), "three plus four"

    async def use(service: Service, __: Worker) -> None:
        first, *words, last = [event async for event in service.watch(ask(text, reasoning="always"))]
        assert isinstance(first, Scored)
        assert first.embedding @ embedder.encode([text], reasoning="never")[0] >= 0.99999
        assert isinstance(last, Ended)
        assert last.embedding @ embedder.encode([text], reasoning="always")[0] >= 0.99999
        assert "".join(word.text for word in words if isinstance(word, Wrote)) == last.detail.rationale == "3+4;3+4=7;"
        assert len(words) > 5

    serving(embedder, use)


def test_a_bad_request_is_refused_and_the_others_are_answered(tiny_embedder: Embedder) -> None:
    async def use(service: Service, __: Worker) -> None:
        bad = [
            service.embed(ask("fine", {"image": b"garbage"})),
            service.embed(Ask(inputs=["one"], options={"truncate_dim": 3})),
            service.embed(ask("late", deadline=1e-9)),
        ]
        good = [service.embed(ask(f"number {number}", reasoning="always")) for number in range(4)]
        *errors, _ = results = await asyncio.gather(*bad, *good, return_exceptions=True)
        assert isinstance(errors[0], InputError)
        assert errors[0].index == 1
        assert isinstance(errors[1], OptionError)
        assert isinstance(errors[2], OverloadError | DeadlineError)
        assert not any(isinstance(each, BaseException) for each in results[3:])

    serving(tiny_embedder, use)


def test_a_client_that_leaves_frees_its_place(tiny_embedder: Embedder) -> None:
    async def use(service: Service, __: Worker) -> None:
        leaving = asyncio.create_task(service.embed(ask(*["a long thought"] * 4, reasoning="always")))
        staying = asyncio.create_task(service.embed(ask("another", reasoning="always")))
        await asyncio.sleep(0.005)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (await staying).details[0] is not None

    serving(tiny_embedder, use, batch_size=2)


def test_more_than_may_wait_is_refused_and_a_drained_service_refuses_all(tiny_embedder: Embedder) -> None:
    async def use(service: Service, __: Worker) -> None:
        full = asyncio.create_task(service.embed(ask(*["one"] * 8)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadError, match="8 inputs wait, and 1 more exceed the limit of 8") as refused:
            await service.embed(ask("two"))
        assert refused.value.reason == "rows"
        draining = asyncio.create_task(service.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(OverloadError, match="stopping"):
            await service.embed(ask("three"))
        assert len((await full).embeddings) == 8
        await draining

    serving(tiny_embedder, use, most=8)


def test_the_collector_passes_over_what_lives_while_a_service_runs(tiny_embedder: Embedder) -> None:
    here = [object()]

    def looked_at() -> bool:
        return any(each is here for each in gc.get_objects())

    async def use(service: Service, __: Worker) -> None:
        assert service.ready
        assert not looked_at()

    serving(tiny_embedder, use)
    assert looked_at()


def test_a_failing_input_fails_alone(tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_path = tiny_embedder.paths.fast_path
    run = type(fast_path).run

    def failing(self: Any, rows: Any, **options: Any) -> Any:
        if any(row.length > 60 for row in rows):
            raise BackendError("too much for the engine")
        return run(self, rows, **options)

    monkeypatch.setattr(type(fast_path), "run", failing)

    async def use(service: Service, __: Worker) -> None:
        texts = ["one", "two", "word " * 80, "three"]
        found = await asyncio.gather(*(service.embed(ask(text)) for text in texts), return_exceptions=True)
        assert [isinstance(each, BackendError) for each in found] == [False, False, True, False]

    serving(tiny_embedder, use)


def test_what_another_s_preparer_let_pass_is_refused_by_the_engines_that_do_not_take_it(
    tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparer = Preparer(tiny_embedder.manifest, tiny_embedder.encoder, backend="elsewhere")
    worker = Worker(tiny_embedder, Limits())
    monkeypatch.setattr(type(tiny_embedder.paths.fast_path), "fits", lambda *_, **__: False)
    prepared = preparer.prepare(["one", "two"])
    rows = [(item.index, item.row, item.given) for item in prepared.items]
    worker.take(Order(7, rows, prepared.options, prepared.policy, 0, math.inf, "direct", watched=False))
    ((number, end),) = worker.report().told
    assert number == 7
    assert isinstance(end, End)
    assert isinstance(end.error, InputError)
    assert end.error.index == 0
    assert "the engines do not take" in str(end.error)


def test_a_defect_answers_everybody_and_says_that_only_a_restart_helps(
    tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(service: Service, __: Worker) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(type(tiny_embedder.paths.fast_path), "run", broken)
        for _ in range(2):
            with pytest.raises(BackendError, match="ZeroDivisionError"):
                await asyncio.wait_for(service.embed(ask("one")), 10)
        assert not service.alive

    serving(tiny_embedder, use)


def test_what_the_figures_name_is_what_the_scheduler_has_done(tiny_embedder: Embedder) -> None:
    async def use(service: Service, __: Worker) -> None:
        before = service.figures()
        await service.embed(ask("one", reasoning="always"))
        after = service.figures()
        for run in ("prefill", "decode"):
            assert after[f"engine_seconds:{run}"] > before[f"engine_seconds:{run}"]
        assert after["num_requests_running"] == 0
        gate = tiny_embedder.manifest.gate
        assert gate is not None
        assert after["gate_threshold"] == pytest.approx(gate.threshold)
        assert np.isfinite(list(after.values())).all()

    serving(tiny_embedder, use)


def test_a_deadline_counts_from_the_question_and_holds_to_the_answer(
    tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long an input waits for its reader, or its answer for its turn."""

    async def use(service: Service, __: Worker) -> None:
        prepare = service._prepare  # pyright: ignore[reportPrivateUsage]

        async def read_slowly(each: Ask) -> Any:
            prepared = await prepare(each)
            await asyncio.sleep(0.2)
            return prepared

        monkeypatch.setattr(service, "_prepare", read_slowly)
        with pytest.raises((DeadlineError, OverloadError)):
            await service.embed(ask("slow to read", deadline=0.1))
        monkeypatch.undo()

        result = service.preparer.result

        def told_slowly(prepared: Prepared) -> EncodeResult:
            time.sleep(2.1)
            return result(prepared)

        monkeypatch.setattr(service.preparer, "result", told_slowly)
        with pytest.raises(DeadlineError, match="after its deadline"):
            await service.embed(ask("slow to be told", deadline=2.0))
        monkeypatch.undo()

    serving(tiny_embedder, use)


def test_what_the_kv_cache_has_no_room_for_waits_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, texts = Embedder.load(), [f"{number} plus four" for number in ("one", "two", "three", "four", "five")]
    expected = embedder.encode(texts, reasoning="always")
    most = 3 * (16 + embedder.manifest.model.max_rationale_tokens)  # tokens of three rows
    limits = embedder.manifest.batch.model_copy(update={"cache_bytes": most * embedder.paths.token_bytes})
    monkeypatch.setattr(embedder, "paths", replace(embedder.paths, limits=limits))
    held: list[int] = []

    async def use(service: Service, worker: Worker) -> None:
        advance = worker.scheduler.advance

        def counted() -> bool:
            held.append(worker.scheduler.cache_tokens)
            return advance()

        monkeypatch.setattr(worker.scheduler, "advance", counted)
        answers = await asyncio.gather(*(service.embed(ask(text, reasoning="always")) for text in 4 * texts))
        for place, answer in enumerate(answers):
            assert answer.embeddings[0] @ expected[place % len(texts)] >= 0.99999

    serving(embedder, use)
    assert 0 < max(held) <= most


def test_memory_that_is_not_there_fails_who_needs_it_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, texts = Embedder.load(), ["one plus two", "three plus four " * 40, "five minus four"]

    def scarce(nbytes: int) -> HostMemory:
        if nbytes > 2**20:
            raise MemoryError
        return HostMemory(nbytes)

    async def use(service: Service, __: Worker) -> None:
        monkeypatch.setattr(host_device, "HostMemory", scarce)
        asked = (service.embed(ask(text, reasoning="always")) for text in texts)
        first, long, last = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(long, BackendError)
        assert "bytes of memory left" in str(long)
        for answer, text in ((first, texts[0]), (last, texts[2])):
            assert isinstance(answer, EncodeResult)
            assert answer.embeddings[0] @ embedder.encode([text], reasoning="always")[0] >= 0.99999
        monkeypatch.undo()
        (detail,) = (await service.embed(ask(texts[1], reasoning="always"))).details
        assert detail is not None

    serving(embedder, use)
