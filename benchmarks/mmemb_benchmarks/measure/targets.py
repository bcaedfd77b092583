"""What the open loop sends its requests to: today's static batches, the two-route loop, a server."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mmemb_benchmarks.measure.open_loop import Answer, Target
from mmemb_benchmarks.workload import Maker
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import BackendError, DeadlineError, MissingExtraError, OptionError, OverloadError
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.reasoners.chat import image_part, text_part
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.routing.router import Route
from mmemb_deploy.serve.ask import Ask
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.worker import Limits

if TYPE_CHECKING:
    import aiohttp

REFUSED = 429, 503
LATE = 504
SECONDS = 600  # that a reply may take


def _answer(result: EncodeResult, row: int = 0) -> Answer:
    detail = result.details[row]
    assert detail is not None
    reasoned = detail.route is Route.REASON
    return Answer(result.embeddings[row], reasoned, detail.threshold, detail.degraded_by)


Waiting = tuple[Ask, asyncio.Future[Answer]]


class StaticBatches:
    """A server without a scheduler: a thread embeds what has arrived, up to a batch, by `encode`, then looks again."""

    def __init__(self, embedder: Embedder, batch_size: int) -> None:
        self._embedder, self._batch_size = embedder, batch_size
        self._inbox: SimpleQueue[Waiting | None] = SimpleQueue()
        self._thread = Thread(target=self._serve, name="static batches", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def ask(self, ask: Ask) -> Answer:
        """Wait for the batch that holds this request."""
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._inbox.put((ask, future))
        return await future

    def _serve(self) -> None:
        while (first := self._inbox.get()) is not None:
            batch = [first]
            try:
                while len(batch) < self._batch_size and (more := self._inbox.get_nowait()) is not None:
                    batch.append(more)
            except Empty:
                pass
            alike: list[list[Waiting]] = []  # `encode` has one set of options a call
            for waiting in batch:
                if not waiting[1].cancelled():
                    group = next((each for each in alike if each[0][0].options == waiting[0].options), None)
                    if group is None:
                        alike.append([waiting])
                    else:
                        group.append(waiting)
            for group in alike:
                self._embed(group)

    def _embed(self, group: Sequence[Waiting]) -> None:
        settings: EncodeOptions = {**group[0][0].options, "batch_size": self._batch_size}
        result = self._embedder.encode_detailed([ask.inputs[0] for ask, _ in group], **settings)
        for row, (_, future) in enumerate(group):
            self._loop.call_soon_threadsafe(_tell, future, _answer(result, row))


def _tell(future: asyncio.Future[Answer], answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)


class TwoRoutes:
    """The service of `mmemb serve` without HTTP."""

    def __init__(
        self, embedder: Embedder, batch_size: int, *, patience: float = 0.5, max_wait: float = math.inf
    ) -> None:
        """`patience` is the seconds that a row may wait before load is high, `max_wait` before others are refused."""
        limits = Limits(batch_size=batch_size, patience=patience, max_wait=max_wait)
        self.service = Service.in_thread(embedder, limits=limits)

    async def __aenter__(self) -> Self:
        await self.service.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.service.drain(0)

    async def ask(self, ask: Ask) -> Answer:
        """Embed one input."""
        return _answer(await self.service.embed(ask))


class Server:
    """A running server that speaks OpenAI's `/v1/embeddings`, ours or another's."""

    def __init__(self, url: str, body: Callable[[Ask, str], dict[str, Any]] | None = None) -> None:
        """`url` is that of the server, without a path; `body` says what is posted to a model, else `openai_body`."""
        self._url, self._body = url.rstrip("/"), body or openai_body
        self._bodies: dict[int, tuple[Ask, bytes]] = {}  # by the ask's identity, which is held for that

    async def __aenter__(self) -> Self:
        try:
            import aiohttp
        except ModuleNotFoundError as error:
            raise MissingExtraError("aiohttp", "bench") from error
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(SECONDS)
        self._client: aiohttp.ClientSession = aiohttp.ClientSession(connector=connector, timeout=timeout)
        try:
            async with self._client.get(f"{self._url}/v1/models") as reply:
                self._model = (await reply.json())["data"][0]["id"]
        except (aiohttp.ClientError, KeyError, IndexError) as error:
            await self._client.close()
            raise OptionError(f"--server is {self._url}: /v1/models does not answer as OpenAI's: {error!r}") from error
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self._client.close()

    async def ask(self, ask: Ask) -> Answer:
        """Send one input. Raises BackendError for an answer that is none."""
        if id(ask) not in self._bodies:
            self._bodies[id(ask)] = ask, json.dumps(self._body(ask, self._model)).encode()
        body = self._bodies[id(ask)][1]
        headers = {"Content-Type": "application/json"}
        async with self._client.post(f"{self._url}/v1/embeddings", data=body, headers=headers) as reply:
            content = await reply.read()
        if reply.status in REFUSED:
            raise OverloadError(content.decode()[:200], reason="server", retry_after=1.0)
        if reply.status == LATE:
            raise DeadlineError(content.decode()[:200])
        if reply.status != 200:
            raise BackendError(f"{self._url} answers with {reply.status}: {content.decode()[:200]}")
        (row,) = json.loads(content)["data"]
        told = row.get("mmemb")
        if told is None and ask.options.get("reasoning") != "never":
            raise BackendError(f"{self._url} says nothing of its routes: measure it with --mode never")
        found = row["embedding"]  # numbers, from a server that knows no base64
        embedding_D = (
            np.frombuffer(base64.b64decode(found), "<f4") if isinstance(found, str) else np.array(found, "<f4")
        )
        if told is None:
            return Answer(embedding_D, False, None, None)
        return Answer(embedding_D, told["route"] == "reason", told["threshold_used"], told["degraded_by"])


def openai_body(ask: Ask, model: str) -> dict[str, Any]:
    """Return what is posted for one input, its pictures as PNG. Raises OptionError for a video, which has no form."""
    request = parse(ask.inputs[0])
    if request.frames:
        raise OptionError("a server takes no videos: pass texts and images")
    wishes = {name: value for name, value in ask.options.items() if value is not None}
    if ask.deadline is not None:
        wishes["deadline_ms"] = 1000 * ask.deadline
    parts = [image_part(image) for image in request.images]
    if request.text:
        parts.append(text_part(request.text))
    given = {"messages": [{"role": "user", "content": parts}]} if request.images else {"input": request.text}
    return {"model": model, "encoding_format": "base64", "on_overload": ask.on_overload, **wishes, **given}


def prompt_body(embedder: Embedder) -> Callable[[Ask, str], dict[str, Any]]:
    """Return what writes an input as the whole prompt, for a server that knows neither instructions nor markers.

    That raises OptionError for an input that is no text.
    """
    maker = Maker(embedder.encoder, embedder.manifest)

    def body(ask: Ask, model: str) -> dict[str, Any]:
        row = maker.row(ask.inputs[0], ask.options.get("instruction"))
        if row.visuals:
            raise OptionError("peers read texts: draw them with --workload 'short text' or 'long text'")
        return {"model": model, "input": embedder.encoder.prompt.decode(row.token_ids_S.tolist())}

    return body


async def least_cosine(target: Target, embedder: Embedder, asks: Sequence[Ask]) -> float:
    """Return the smallest cosine of what a target answers to what `encode` does, one by one."""
    cosines: list[float] = []
    for ask in asks:
        other_D = (await target.ask(ask)).embedding_D
        cosines.append(float(embedder.similarity(embedder.encode(ask.inputs, **ask.options), other_D[None])[0, 0]))
    return min(cosines)


AnyTarget = StaticBatches | TwoRoutes | Server


@asynccontextmanager
async def opened(targets: Mapping[str, AnyTarget]) -> AsyncGenerator[None]:
    """Start targets, and stop them at the end."""
    async with AsyncExitStack() as stack:
        for target in targets.values():
            await stack.enter_async_context(target)
        yield
