"""A client of OpenAI-compatible chat servers (vLLM and kin): many chats at once, each with its own outcome."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image
from pydantic import BaseModel, ValidationError

from mmemb_deploy.errors import BackendError, InputError, MissingExtraError, OptionError
from mmemb_deploy.inputs.images import data_uri

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

Chat = Callable[[], "list[ChatCompletionMessageParam]"]  # builds its messages when they are sent


class Message(BaseModel):
    """What a server wrote; one with a reasoning parser returns the reasoning apart from the content."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # its former name

    @property
    def thought(self) -> str:
        """The reasoning, empty where the server keeps it within the content."""
        return self.reasoning or self.reasoning_content or ""


class TokenLogprob(BaseModel):
    """A token that was drawn, and its log-probability; vLLM names it "token_id:7" where that was asked for."""

    token: str
    logprob: float


class Logprobs(BaseModel):
    """The log-probabilities of an answer's tokens."""

    content: list[TokenLogprob] | None = None


class Sample(BaseModel):
    """One answer to a chat; `finish_reason` is "stop", or "length" where `max_tokens` cut it.

    vLLM returns `token_ids`, those that were drawn, where `return_token_ids` asks for them.
    """

    message: Message
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None


class Completion(BaseModel):
    """The parts of a chat completion that are read; others are ignored, as servers differ in them."""

    choices: list[Sample]
    prompt_token_ids: list[int] | None = None  # vLLM's, where `return_token_ids` asks for them


@dataclass(frozen=True)
class Reply:
    """The samples that answer one chat, or what failed after all retries."""

    choices: list[Sample]
    error: str | None = None
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True)
class ChatClient:
    """A client of one OpenAI-compatible server, and how patient it is.

    Raises OptionError for a value out of range, an address that is none, and a key variable that is not set;
    MissingExtraError without openai.
    """

    base_url: str
    """Such as "http://localhost:8000/v1"."""

    _: KW_ONLY

    model: str
    """The name under which the server serves the model."""

    api_key_variable: str | None = None
    """The environment variable with the key; None where the server wants none."""

    timeout: float = 30.0
    """Seconds without an answer after which an attempt is given up."""

    max_retries: int = 2
    """Attempts after the first where the server is busy, fails or cannot be reached, with growing pauses."""

    concurrency: int = 16
    """Requests that are in flight together."""

    def __post_init__(self) -> None:
        if find_spec("openai") is None:
            raise MissingExtraError("openai", "remote")
        _check_address(self.base_url)
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise OptionError(f"timeout is {self.timeout}: pass seconds, above 0")
        if self.max_retries < 0:
            raise OptionError(f"max_retries is {self.max_retries}: it must be at least 0")
        if self.concurrency < 1:
            raise OptionError(f"concurrency is {self.concurrency}: it must be at least 1")
        if self.api_key_variable is not None and not os.environ.get(self.api_key_variable):
            raise OptionError(
                f"the environment variable {self.api_key_variable} is not set: put the endpoint's key there"
            )

    def ask(
        self,
        chats: Sequence[Chat],
        *,
        each: Sequence[Mapping[str, Any]] | None = None,
        deadline: float | None = None,
        **request: Any,
    ) -> list[Reply]:
        """Return the reply to every chat; `request` holds the other parameters of a chat completion.

        `each` holds, for every chat, those that are its own. `deadline` is in seconds and bounds all attempts at one
        chat together. A chat that raises InputError fails alone. Raises BackendError where the server refuses the key
        or does not know the model or address (401, 404).
        """
        requests = [request | dict(own) for own in each or [{}] * len(chats)]
        return _run(self._ask_all(chats, deadline, requests))

    @property
    def key(self) -> str:
        """The key that the server is shown."""
        return "unused" if self.api_key_variable is None else os.environ[self.api_key_variable]

    async def _ask_all(
        self, chats: Sequence[Chat], deadline: float | None, requests: Sequence[dict[str, Any]]
    ) -> list[Reply]:
        from openai import AsyncOpenAI

        slots = asyncio.Semaphore(self.concurrency)
        async with AsyncOpenAI(
            base_url=self.base_url, api_key=self.key, max_retries=self.max_retries, timeout=self.timeout
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self._ask_one(client, slots, chat, deadline, request))
                        for chat, request in zip(chats, requests, strict=True)
                    ]
            except ExceptionGroup as failed:  # the first cancelled the others
                raise failed.exceptions[0] from failed.exceptions[0].__cause__
        return [task.result() for task in tasks]

    async def _ask_one(
        self, client: AsyncOpenAI, slots: asyncio.Semaphore, chat: Chat, deadline: float | None, request: dict[str, Any]
    ) -> Reply:
        from openai import APIError, AuthenticationError, NotFoundError

        async with slots:
            try:
                messages = await asyncio.to_thread(chat)
                async with asyncio.timeout(deadline):
                    answer = await client.chat.completions.with_raw_response.create(
                        model=self.model, messages=messages, **request
                    )
                found = Completion.model_validate_json(answer.content)
                return Reply(found.choices, prompt_token_ids=found.prompt_token_ids)
            except (AuthenticationError, NotFoundError) as error:
                raise BackendError(
                    f"{self.base_url} refused model {self.model!r}: {error.message}. Check the address, the model's "
                    f"name and the key"
                ) from error
            except TimeoutError:
                return Reply([], f"TimeoutError: no answer within {deadline} s, retries included")
            except ValidationError as error:
                return Reply([], f"the answer is no chat completion: {_first_problem(error)}")
            except InputError as error:
                return Reply([], f"InputError: {error}")
            except APIError as error:
                cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
                return Reply([], f"{type(error).__name__}: {error}{cause}")


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not pair, or a port that is no number
        parts, known = None, False
    if parts is not None and parts.username is not None:
        raise OptionError("base_url holds a user name: put the key into an environment variable, api_key_variable")
    if not known:
        raise OptionError(f"base_url is {url!r}: pass an address such as 'http://localhost:8000/v1'")


def text_part(text: str) -> dict[str, Any]:
    """Return words as part of a message."""
    return {"type": "text", "text": text}


def image_part(image: Image.Image) -> dict[str, Any]:
    """Return an image as part of a message, as a PNG data URL."""
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def video_part(frames: Sequence[Image.Image]) -> dict[str, Any]:
    """Return a video as part of a message: its frames as PNG, in the list that vLLM reads under the type video/jpeg.

    What times they have is said beside the messages, by `media_io_kwargs`.
    """
    encoded = ",".join(data_uri(frame).partition(",")[2] for frame in frames)
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{encoded}"}}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def _run(work: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """Run a coroutine to its end, from inside an event loop too: notebooks call `encode` within theirs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
