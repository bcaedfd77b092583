"""An external generation engine: a server that holds the checkpoint writes the rationales (vLLM and kin).

It is sent the prompt that the bundle's own generator continues from, as a chat that the checkpoint's template renders;
the embedder then follows the answer from its own KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from mmemb_deploy.backends.protocol import Cache
from mmemb_deploy.errors import BackendError, InputError, check_known
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.parse import Request, parse
from mmemb_deploy.inputs.prompts import END_THINK, MARKERS, THINK, PromptFormat
from mmemb_deploy.inputs.rows import RowEncoder
from mmemb_deploy.reasoners.chat import Chat, ChatClient, Reply, image_part, text_part, video_part
from mmemb_deploy.routing.generation import Generator
from mmemb_deploy.routing.items import Item, Reasoned

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam
    from PIL import Image

ON_FAILURE = ("raise", "direct")
HELD_BYTES = 256 * 2**20  # of decoded pixels, in one call


@dataclass(frozen=True, kw_only=True)
class RemoteReasoner(ChatClient):
    """Writes the rationales of `Embedder.load(bundle, reasoner=RemoteReasoner("http://localhost:8000/v1", model="m"))`.

    The server must render chats by the checkpoint's own template, as vLLM does when it serves the checkpoint's folder.
    `timeout` bounds all attempts at one input together.
    """

    on_failure: str = "raise"
    """Where an input gets no rationale: "raise" a BackendError, or return its "direct" embedding and say so in Detail.

    A server that refuses the key, or does not know the model or the address, raises either way.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("on_failure", self.on_failure, ON_FAILURE)

    @property
    def name(self) -> str:
        """What details call it: the model and where it is served."""
        return f"{self.model} at {self.base_url}"

    def writer(self, encoder: RowEncoder, generator: Generator, limits: Limits) -> RemoteWriter:
        """Return what writes rationales in one prompt format, and lets a generator follow them."""
        return RemoteWriter(self, encoder, generator, limits)


class RemoteWriter:
    """Asks a reasoner for the rationales that the bundle's own generator would write, greedily, and follows them."""

    def __init__(self, reasoner: RemoteReasoner, encoder: RowEncoder, generator: Generator, limits: Limits) -> None:
        self.name = reasoner.name
        self._reasoner, self._prompt, self._vision = reasoner, encoder.prompt, encoder.vision
        self._generator, self._limits = generator, limits

    def chats(self) -> Callable[[object, Request, str], Chat]:
        """Return what prepares an input's chat, for the inputs of one call.

        HELD_BYTES of decoded pixels are held until they are sent; what exceeds them is decoded again then. Raises
        InputError for what a chat does not carry: a video's times, and words that spell a marker, which a server would
        read as the marker.
        """
        capacity = HELD_BYTES

        def chat(content: object, request: Request, instruction: str) -> Chat:
            nonlocal capacity
            _check_still(request)
            for part, words in (("the instruction", instruction), ("'text'", request.text)):
                for marker in MARKERS:
                    if marker in words:
                        raise InputError(
                            f"{part} spells {marker}, which a server reads as the marker itself: reword it, or embed "
                            "this input with reasoning='never'"
                        )
            size = sum(3 * image.width * image.height for image in request.images)
            if size > capacity:
                return lambda: policy_messages(
                    self._prompt.format, instruction, parse(content, self._limits, self._vision)
                )
            capacity -= size
            return lambda: policy_messages(self._prompt.format, instruction, request)

        return chat

    def write(self, items: Sequence[Item], caches: Sequence[Cache], max_tokens: int) -> list[Reasoned | str]:
        """Ask for all items together; the tokens of an answer above `max_tokens` are cut.

        Raises BackendError, naming the input, for one without a rationale, unless the reasoner's `on_failure` is
        "direct".
        """
        replies = self._reasoner.ask(
            [item.chat for item in items if item.chat is not None],
            deadline=self._reasoner.timeout,
            temperature=0,
            max_tokens=max_tokens,
            stop=END_THINK,
        )
        read = [self._read(reply) for reply in replies]
        for item, answer in zip(items, read, strict=True):
            if isinstance(answer, str) and self._reasoner.on_failure == "raise":
                raise BackendError(
                    f"input {item.index}: no rationale from {self.name}: {answer}. Check the server, or pass "
                    "on_failure='direct' to take the direct embedding instead"
                )
        answered = [(cache, answer) for cache, answer in zip(caches, read, strict=True) if not isinstance(answer, str)]
        rationales = [token_ids[:max_tokens] for _, (token_ids, _) in answered]
        followed = iter(self._generator.follow([cache for cache, _ in answered], rationales) if answered else [])
        return [
            answer
            if isinstance(answer, str)
            else replace(next(followed), truncated=answer[1] or len(answer[0]) > max_tokens)
            for answer in read
        ]

    def _read(self, reply: Reply) -> tuple[list[int], bool] | str:
        """Return a rationale's token ids and whether the limit cut it, or why there is none."""
        if reply.error is not None:
            return reply.error
        if not reply.choices:
            return "the answer has no choices"
        sample = reply.choices[0]
        if sample.finish_reason not in ("stop", "length"):
            return f"the answer ended by {sample.finish_reason!r}, not 'stop' or 'length'"
        said = sample.message.thought or sample.message.content or ""
        rationale = said.partition(END_THINK)[0].removeprefix(THINK)
        if not rationale.strip():
            return "the answer is empty"
        return self._prompt.tokenize(rationale), sample.finish_reason == "length"


def policy_messages(
    prompt: PromptFormat, instruction: str, request: Request, video: Sequence[Image.Image] = ()
) -> list[ChatCompletionMessageParam]:
    """Return the chat that the checkpoint's template renders as `mmemb_deploy.inputs.prompts` lays an input out.

    Images are PNG data URLs of the pixels that were given. A video is sent as the frames `video`, to a server that is
    told their times (vLLM).
    """
    content: list[Any] = [text_part(f"{instruction}\n")] if instruction else []
    content += map(image_part, request.images)
    content += [video_part(video)] if video else []
    content += [text_part(request.text)] if request.text else []
    chat = [{"role": "system", "content": prompt.system}, {"role": "user", "content": content}]
    return cast("list[ChatCompletionMessageParam]", chat)


def _check_still(request: Request) -> None:
    if request.frames:
        raise InputError(
            "'video' cannot be sent to a reasoner, as a chat does not carry its frames' times: embed this input with "
            "reasoning='never', with a rationale of its own, or without a reasoner"
        )
