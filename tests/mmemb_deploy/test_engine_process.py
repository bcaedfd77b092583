"""The engine in a process of its own: what it answers, and what happens when one of the two processes goes."""

import asyncio
import os
import pickle
import select
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmemb_deploy import BackendError, Embedder, InputError, OverloadError
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.errors import MissingExtraError, MmembError
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.preparer import Preparer, row_encoder
from mmemb_deploy.serve import process
from mmemb_deploy.serve.ask import Ask, Ended, Scored, Wrote
from mmemb_deploy.serve.process import Channel, EngineProcess, Frames, packed
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.worker import Limits

TEXT = "three plus four"
LONG = Ask(inputs=["six minus eight times two"] * 400, options={"reasoning": "always"})


def serving(use: Callable[[Service, EngineProcess], Awaitable[None]], limits: Limits | None = None) -> None:
    """Start a service of the embedded bundle, use it, drain it."""
    bundle = Bundle.open(NANO)
    engine = EngineProcess(bundle, backend="onnxruntime", threads=1, limits=limits, log_level="warning")
    preparer = Preparer(bundle.manifest, row_encoder(bundle), backend=engine.loaded())

    async def run() -> None:
        service = Service(preparer, engine)
        await service.start()
        try:
            await use(service, engine)
        finally:
            await service.drain(10)

    asyncio.run(run())
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


def ask(reasoning: str = "auto") -> Ask:
    return Ask(inputs=[TEXT], options={"reasoning": reasoning})


def test_it_answers_what_encode_does(mixed_inputs: list[Any]) -> None:
    embedder = Embedder.load(backend="onnxruntime", threads=1)
    inputs = [*mixed_inputs, TEXT]
    asked: list[tuple[list[Any], EncodeOptions]] = [
        ([each], {"reasoning": mode}) for each in inputs for mode in ("never", "auto", "always")
    ]
    asked.append((inputs, {"reasoning_rate": 0.5}))

    async def use(service: Service, _: EngineProcess) -> None:
        answers = await asyncio.gather(*(service.embed(Ask(inputs=each, options=how)) for each, how in asked))
        for (each, how), answer in zip(asked, answers, strict=True):
            expected = embedder.encode_detailed(each, **how)
            assert (answer.embeddings * expected.embeddings).sum(axis=1).min() >= 0.99999
            for found, wanted in zip(answer.details, expected.details, strict=True):
                assert found is not None
                assert wanted is not None
                assert (found.route, found.rationale, found.visual_tokens) == (
                    wanted.route,
                    wanted.rationale,
                    wanted.visual_tokens,
                )
        first, *words, last = [event async for event in service.watch(ask("always"))]
        assert isinstance(first, Scored)
        assert isinstance(last, Ended)
        assert "".join(word.text for word in words if isinstance(word, Wrote)) == last.detail.rationale == "3+4;3+4=7;"
        assert service.figures()["num_requests_running"] == 0
        assert service.engine_seconds > 0

    serving(use)


def test_until_it_serves_it_embeds_documents() -> None:
    engine = EngineProcess(Bundle.open(NANO), backend="onnxruntime", threads=1)
    assert engine.loaded().startswith("onnxruntime")
    documents = engine.encode_document(["seven", "eight"])
    assert (documents * Embedder.load().encode_document(["seven", "eight"])).sum(axis=1).min() >= 0.99999
    with pytest.raises(InputError, match="input 1") as refused:
        engine.encode_document(["seven", b"garbage"])
    assert refused.value.index == 1
    engine._socket.close()  # as where the process that it serves goes  # pyright: ignore[reportPrivateUsage]
    assert engine._process.wait(30) == 0  # pyright: ignore[reportPrivateUsage]


def test_what_cannot_be_loaded_there_is_said_here() -> None:
    bundle = Bundle.open(NANO)
    with pytest.raises(MmembError) as expected:
        Embedder.of_bundle(bundle, backend="tensorrt")
    with pytest.raises(type(expected.value)) as found:
        EngineProcess(bundle, backend="tensorrt").loaded()
    assert str(found.value) == str(expected.value)


def test_what_the_engine_refuses_is_refused_with_its_reason_and_who_leaves_makes_room() -> None:
    async def use(service: Service, _: EngineProcess) -> None:
        first = asyncio.create_task(service.embed(LONG))
        while not service.figures()["num_requests_running"]:
            await asyncio.sleep(0.01)
        with pytest.raises(OverloadError, match="prompts wait before it") as refused:
            await service.embed(ask())
        assert refused.value.reason == "wait"
        assert refused.value.retry_after >= 0
        first.cancel()
        while service.backlog_seconds:
            await asyncio.sleep(0.01)
        await service.embed(ask())

    serving(use, Limits(max_wait=1e-6))


def test_signals_for_the_whole_group_are_the_service_s_to_answer() -> None:
    async def use(service: Service, engine: EngineProcess) -> None:
        for stop in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine.pid, stop)
        assert len((await service.embed(ask())).embeddings) == 1

    serving(use)


def test_where_it_dies_all_who_wait_hear_of_it_and_so_do_all_who_come() -> None:
    async def use(service: Service, engine: EngineProcess) -> None:
        waiting = asyncio.create_task(service.embed(LONG))
        while not service.figures()["num_requests_running"]:
            await asyncio.sleep(0.01)
        os.kill(engine.pid, signal.SIGKILL)
        for asked in (waiting, service.embed(ask())):
            with pytest.raises(BackendError, match="has ended with signal SIGKILL: start the server again"):
                await asyncio.wait_for(asked, 30)
        assert not service.alive

    serving(use)


def test_where_it_hangs_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ENDING", 0.2)

    async def use(service: Service, engine: EngineProcess) -> None:
        assert service.ready
        os.kill(engine.pid, signal.SIGSTOP)

    serving(use)


@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(0, 400), max_size=20))
def test_objects_arrive_whole_however_they_are_cut(sent: list[bytes], cuts: list[int]) -> None:
    stream, frames = b"".join(map(packed, sent)), Frames()
    ends = [*sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    received = [each for start, end in zip([0, *ends], ends, strict=False) for each in frames.feed(stream[start:end])]
    assert received == sent


def test_what_has_begun_to_arrive_is_waited_for_and_nothing_else() -> None:
    here, there = socket.socketpair()
    with here, there:
        channel, image = Channel(here), bytes(10 * 2**20)
        assert channel.receive(wait=False) == []

        def send() -> None:
            there.sendall(packed(image))
            there.sendall(packed("after"))

        thread = threading.Thread(target=send)
        thread.start()
        select.select([here], [], [], 60)
        received = channel.receive(wait=False)
        assert received[0] == image
        thread.join()
        assert [*received[1:], *channel.receive(wait=False)] == ["after"]
        for each in ("one", "two", "three"):
            there.sendall(packed(each))
        assert channel.receive_one() == "one"
        assert channel.receive(wait=False) == ["two", "three"]


@pytest.mark.parametrize(
    "error",
    [
        InputError("too long", index=3),
        OverloadError("full", reason="rows", retry_after=0.5),
        MissingExtraError("ray", "ray"),
        BackendError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_reach_other_processes_whole(error: MmembError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
