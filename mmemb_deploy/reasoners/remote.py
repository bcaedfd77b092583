"""An external generation engine: a server that holds the checkpoint writes the rationales (vLLM and kin).

It is sent the prompt that the bundle's own generator continues from, as a chat that the checkpoint's template renders;
the embedder then follows the answer from its own KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mmemb_deploy.errors import BackendError, InputError, check_known
from mmemb_deploy.inputs.parse import Limits, Request, parse
from mmemb_deploy.inputs.prompts import END_THINK, MARKERS, THINK, PromptEncoder, PromptFormat
from mmemb_deploy.reasoners.chat import Chat, ChatServer, Reply, image_part, text_part

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

ON_FAILURE = ("raise", "direct")


@dataclass(frozen=True, kw_only=True)
class RemoteReasoner(ChatServer):
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

    def generator(self, prompt: PromptEncoder, limits: Limits) -> RemoteGenerator:
        """Return what writes rationales in one prompt format."""
        return RemoteGenerator(self, prompt, limits)


@dataclass(frozen=True)
class Rationale:
    """A rationale's token ids without its markers, and whether the token limit closed it; or why there is none."""

    token_ids: list[int]
    truncated: bool = False
    failure: str | None = None


class RemoteGenerator:
    """Asks a reasoner for the rationales that the bundle's own generator would write, greedily."""

    def __init__(self, reasoner: RemoteReasoner, prompt: PromptEncoder, limits: Limits) -> None:
        self.name = reasoner.name
        self._reasoner, self._prompt, self._limits = reasoner, prompt, limits

    def chat(self, content: object, request: Request, instruction: str) -> Chat:
        """Return what builds an input's chat, from the caller's own content: its pixels are not held until then.

        Raises InputError for what a chat does not carry: a video's times, and words that spell a marker, which a server
        would read as the marker.
        """
        _check_still(request)
        for part, words in (("the instruction", instruction), ("'text'", request.text)):
            for marker in MARKERS:
                if marker in words:
                    raise InputError(
                        f"{part} spells {marker}, which a server reads as the marker itself: reword it, or embed this "
                        "input with reasoning='never'"
                    )
        return lambda: policy_messages(self._prompt.format, instruction, parse(content, self._limits))

    def write(self, chats: Mapping[int, Chat], max_tokens: int) -> dict[int, Rationale]:
        """Return a rationale of at most `max_tokens` words for every input, by its index.

        Raises BackendError, naming the input, for one without a rationale, unless the reasoner's `on_failure` is
        "direct".
        """
        replies = self._reasoner.ask(
            list(chats.values()), deadline=self._reasoner.timeout, temperature=0, max_tokens=max_tokens, stop=END_THINK
        )
        written = {index: self._read(reply, max_tokens) for index, reply in zip(chats, replies, strict=True)}
        if self._reasoner.on_failure == "raise":
            for index, rationale in written.items():
                if rationale.failure is not None:
                    raise BackendError(
                        f"input {index}: no rationale from {self.name}: {rationale.failure}. Check the server, or pass "
                        "on_failure='direct' to take the direct embedding instead"
                    )
        return written

    def _read(self, reply: Reply, max_tokens: int) -> Rationale:
        if reply.error is not None:
            return Rationale([], failure=reply.error)
        if not reply.choices:
            return Rationale([], failure="the answer has no choices")
        choice = reply.choices[0]
        if choice.finish_reason not in ("stop", "length"):
            return Rationale([], failure=f"the answer ended by {choice.finish_reason!r}, not 'stop' or 'length'")
        said = choice.message.thought or choice.message.content or ""
        words = said.partition(END_THINK)[0].removeprefix(THINK)
        if not words.strip():
            return Rationale([], failure="the answer is empty")
        ids = self._prompt.tokenize(words)
        return Rationale(ids[:max_tokens], choice.finish_reason == "length" or len(ids) > max_tokens)


def policy_messages(prompt: PromptFormat, instruction: str, request: Request) -> list[ChatCompletionMessageParam]:
    """Return the chat that the checkpoint's template renders as `mmemb_deploy.inputs.prompts` lays an input out.

    Images are PNG data URLs of the pixels that were given. Raises InputError for a video.
    """
    _check_still(request)
    content: list[Any] = [text_part(f"{instruction}\n")] if instruction else []
    content += map(image_part, request.images)
    content += [text_part(request.text)] if request.text else []
    chat = [{"role": "system", "content": prompt.system}, {"role": "user", "content": content}]
    return cast("list[ChatCompletionMessageParam]", chat)


def _check_still(request: Request) -> None:
    if request.frames:
        raise InputError(
            "'video' cannot be sent to a reasoner, as a chat does not carry its frames' times: embed this input with "
            "reasoning='never', with a rationale of its own, or without a reasoner"
        )
