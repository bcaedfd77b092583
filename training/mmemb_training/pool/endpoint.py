"""A worker over an OpenAI-compatible endpoint (vLLM and kin), and what a model is shown of a question.

Reasoning and answer are kept together as one rationale: a server with a reasoning parser returns them apart (vLLM as
`reasoning`, formerly `reasoning_content`), one without returns them as one text around think tags. Either way the pool
holds the reasoning, then the conclusion, and no tag: `</think>` inside a rationale would end it early.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from mmemb_deploy.errors import BackendError, InputError, MissingExtraError, OptionError
from mmemb_deploy.inputs import parse
from mmemb_training.pool.workers import REQUEST, Written
from mmemb_training.samples import Question

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

_THINK_TAG = re.compile(r"\s*</?think>\s*")


def shown_parts(question: Question, max_frames: int) -> list[str | Image.Image]:
    """Return what a model is shown of a question, in order: instruction, images, timed video frames, text.

    Of a longer video, `max_frames` frames are shown, spread evenly from its first to its last. Raises InputError for a
    content that cannot be read.
    """
    request = parse(question.content)
    parts: list[str | Image.Image] = [question.instruction] if question.instruction else []
    parts += request.images
    last = len(request.frames) - 1
    count = min(max_frames, len(request.frames))
    for place in range(count):
        frame = place * last // max(1, count - 1)
        parts += [f"<{request.timestamps[frame]:.1f} seconds>", request.frames[frame]]
    return [*parts, request.text] if request.text else parts


def plain_rationale(text: str) -> str:
    """Return what a model wrote without its think tags, their text kept."""
    return _THINK_TAG.sub("\n", text).strip()


def chat_messages(question: Question, max_frames: int) -> list[ChatCompletionMessageParam]:
    """Return the chat that asks for a rationale, images as PNG data URLs. Raises InputError as `shown_parts` does."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in shown_parts(question, max_frames)
    ]
    chat = [{"role": "system", "content": REQUEST}, {"role": "user", "content": content}]
    return cast("list[ChatCompletionMessageParam]", chat)


class EndpointWorker:
    """Asks a served model for `samples` rationales per question, at most `concurrency` requests at a time.

    `api_key_variable` names the environment variable with the key; None where the server wants none. The client waits
    and retries by itself where a server is busy, fails or cannot be reached, `max_retries` times; `timeout` is seconds
    per request; `stop` ends a rationale where the model writes it. Raises OptionError for a variable that is not set,
    MissingExtraError without openai.
    """

    def __init__(
        self,
        name: str,
        *,
        base_url: str,
        model: str,
        samples: int,
        api_key_variable: str | None = None,
        temperature: float = 1.0,
        max_tokens: int = 1024,
        concurrency: int = 16,
        max_retries: int = 5,
        timeout: float = 300.0,
        max_frames: int = 16,
        stop: str | None = None,
    ) -> None:
        if find_spec("openai") is None:
            raise MissingExtraError("openai", "train")
        for option, value in {"samples": samples, "concurrency": concurrency, "max_frames": max_frames}.items():
            if value < 1:
                raise OptionError(f"{option} is {value}; pass at least 1")
        if api_key_variable is not None and not os.environ.get(api_key_variable):
            raise OptionError(f"the environment variable {api_key_variable} is not set: put the endpoint's key there")
        self.name = name
        self.samples = samples
        self._base_url = base_url
        self._model = model
        self._api_key_variable = api_key_variable
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._concurrency = concurrency
        self._max_retries = max_retries
        self._timeout = timeout
        self._max_frames = max_frames
        self._stop = stop

    def messages(self, question: Question) -> list[ChatCompletionMessageParam]:
        """Return what the model is sent for a question. Raises InputError for a content that cannot be read."""
        return chat_messages(question, self._max_frames)

    def write(self, questions: Sequence[Question]) -> list[Written]:
        """Return what was written for each question, or why it failed after all retries.

        Raises BackendError where the endpoint refuses the key or does not know the model or address (401, 404).
        """
        return asyncio.run(self._write_all(questions))

    async def _write_all(self, questions: Sequence[Question]) -> list[Written]:
        from openai import AsyncOpenAI

        key = "unused" if self._api_key_variable is None else os.environ[self._api_key_variable]
        slots = asyncio.Semaphore(self._concurrency)
        async with AsyncOpenAI(
            base_url=self._base_url, api_key=key, max_retries=self._max_retries, timeout=self._timeout
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._write_one(client, slots, question)) for question in questions]
            except ExceptionGroup as failed:  # the first cancelled the others
                raise failed.exceptions[0] from failed.exceptions[0].__cause__
        return [task.result() for task in tasks]

    async def _write_one(self, client: AsyncOpenAI, slots: asyncio.Semaphore, question: Question) -> Written:
        from openai import APIError, AuthenticationError, NotFoundError

        async with slots:
            try:
                messages = await asyncio.to_thread(self.messages, question)
                answer = await client.chat.completions.create(
                    model=self._model,
                    messages=messages,
                    n=self.samples,
                    temperature=self._temperature,
                    max_tokens=self._max_tokens,
                    stop=self._stop,
                )
            except (AuthenticationError, NotFoundError) as error:
                raise BackendError(
                    f"{self._base_url} refused worker {self.name!r}, model {self._model!r}: {error.message}. Check the "
                    f"address, the model's name and the key"
                ) from error
            except (APIError, InputError) as error:
                return Written((), f"{type(error).__name__}: {error}")
        return self._written(answer)

    def _written(self, answer: object) -> Written:
        """Read an answer, which is a plain text where a proxy answered with a page of its own."""
        choices: list[Any] = getattr(answer, "choices", None) or []
        if len(choices) != self.samples:
            return Written(
                (), f"the endpoint answered with {len(choices)} of {self.samples} samples: it may not support `n`"
            )
        return Written(tuple(_rationale(choice.message) for choice in choices), None)


def _rationale(message: Any) -> str:
    extra = message.model_extra
    reasoning = extra.get("reasoning") or extra.get("reasoning_content") or ""
    return plain_rationale(f"{reasoning}\n{message.content or ''}")


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
