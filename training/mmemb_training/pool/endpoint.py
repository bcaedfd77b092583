"""A worker over an OpenAI-compatible endpoint (vLLM and kin), and what a model is shown of a question.

Reasoning and answer are kept together as one rationale: a server with a reasoning parser returns them apart (vLLM as
`reasoning`, formerly `reasoning_content`), one without returns them as one text around think tags. Either way the pool
holds the reasoning, then the conclusion, and no tag: `</think>` inside a rationale would end it early.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from PIL import Image

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.reasoners.chat import ChatClient, Reply, Sample, image_part, text_part
from mmemb_training.pool.workers import REQUEST, Written
from mmemb_training.samples import Question

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

CUT = "length"  # the finish reason of an answer that the limit on its tokens ended; it teaches to end in mid-sentence
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
    for index in range(count):
        frame = index * last // max(1, count - 1)
        parts += [f"<{request.timestamps[frame]:.1f} seconds>", request.frames[frame]]
    return [*parts, request.text] if request.text else parts


def plain_rationale(text: str) -> str:
    """Return what a model wrote without its think tags, their text kept."""
    return _THINK_TAG.sub("\n", text).strip()


def chat_messages(question: Question, max_frames: int) -> list[ChatCompletionMessageParam]:
    """Return the chat that asks for a rationale, images as PNG data URLs. Raises InputError as `shown_parts` does."""
    content = [
        text_part(part) if isinstance(part, str) else image_part(part) for part in shown_parts(question, max_frames)
    ]
    chat = [{"role": "system", "content": REQUEST}, {"role": "user", "content": content}]
    return cast("list[ChatCompletionMessageParam]", chat)


class EndpointWorker:
    """Asks a served model for `samples` rationales per question.

    `base_url`, `model`, `api_key_variable`, `concurrency`, `max_retries` and `timeout` are those of
    `mmemb_deploy.reasoners.chat.ChatClient`, whose errors it raises; `stop` ends a rationale where the model writes it.
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
        for option, value in {"samples": samples, "max_frames": max_frames}.items():
            if value < 1:
                raise OptionError(f"{option} is {value}; pass at least 1")
        self.name = name
        self.samples = samples
        self._server = ChatClient(
            base_url,
            model=model,
            api_key_variable=api_key_variable,
            timeout=timeout,
            max_retries=max_retries,
            concurrency=concurrency,
        )
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._max_frames = max_frames
        self._stop = stop

    def messages(self, question: Question) -> list[ChatCompletionMessageParam]:
        """Return what the model is sent for a question. Raises InputError for a content that cannot be read."""
        return chat_messages(question, self._max_frames)

    def write(self, questions: Sequence[Question]) -> list[Written]:
        """Return what was written for each question, or why it failed after all retries.

        Raises BackendError where the endpoint refuses the key or does not know the model or address (401, 404).
        """
        replies = self._server.ask(
            [partial(self.messages, question) for question in questions],
            n=self.samples,
            temperature=self._temperature,
            max_tokens=self._max_tokens,
            stop=self._stop,
        )
        return [self._written(reply) for reply in replies]

    def _written(self, reply: Reply) -> Written:
        if reply.error is not None:
            return Written((), reply.error)
        found = len(reply.choices)
        if found != self.samples:
            return Written((), f"the endpoint answered with {found} of {self.samples} samples: it may not support `n`")
        whole = tuple(_rationale(choice) for choice in reply.choices if choice.finish_reason != CUT)
        if not whole:
            return Written((), f"each of {found} answers was cut after {self._max_tokens} tokens: allow more")
        return Written(whole)


def _rationale(choice: Sample) -> str:
    message = choice.message
    return plain_rationale(f"{message.thought}\n{message.content or ''}")
