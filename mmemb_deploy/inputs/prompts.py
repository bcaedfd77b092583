"""The prompt layouts that training, export and the runtime share.

MMEmb-R1's has one sequence for both paths:

    <|im_start|>system\\n SYSTEM <|im_end|>\\n
    <|im_start|>user\\n INSTRUCTION\\n images, video frames, TEXT <|im_end|>\\n
    <|im_start|>assistant\\n <|disc_emb|>                                      the fast path ends here
    <think> RATIONALE </think> <|gen_emb|>                                     the reasoning path ends here

Qwen3-VL-Embedding's is that of its public inference script, and has no reasoning path:

    <|im_start|>system\\n INSTRUCTION, or else SYSTEM <|im_end|>\\n
    <|im_start|>user\\n video frames, images, TEXT, or NULL <|im_end|>\\n
    <|im_start|>assistant\\n and what the tokenizer puts at the end of a text

The pieces in capitals are a caller's or a model's words: they are tokenised with special tokens disabled, so that a
text that happens to contain "<|image_pad|>" stays a text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from mmemb_deploy.errors import SchemaError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DISC_EMB = "<|disc_emb|>"  # its state is the direct embedding, and decides the route
GEN_EMB = "<|gen_emb|>"  # its state is the reasoned embedding
THINK = "<think>"
END_THINK = "</think>"
STOP = "<|im_end|>"  # the alternative to <think> at <|disc_emb|>
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
TURN_START = "<|im_start|>"
PAD = "<|endoftext|>"
CHAT_MARKERS = (STOP, IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END, TURN_START, PAD)
MARKERS = (DISC_EMB, GEN_EMB, THINK, END_THINK, *CHAT_MARKERS)

HEADS = 64  # instructions whose ids are remembered

# Qwen's tokenizers hold `<think>` and `</think>` as plain added tokens, which are matched even where special ones are
# not: a text that spells one is split inside it.
_SPELT_MARKER = re.compile(r"(?<=<)(?=/?think>)")


@dataclass(frozen=True)
class PromptFormat:
    """The words around an input: the system message, and the instructions for queries and documents."""

    system: str
    query_instruction: str
    document_instruction: str
    layout: Literal["mmemb-r1", "qwen3-vl-embedding"] = "mmemb-r1"

    @property
    def reasons(self) -> bool:
        """Whether the layout has a reasoning path."""
        return self.layout == "mmemb-r1"


class PromptEncoder:
    """Turns the parts of an input into token ids. Raises SchemaError if the tokenizer lacks a marker."""

    def __init__(self, tokenizer: Tokenizer, prompt: PromptFormat) -> None:
        self.tokenizer = tokenizer
        self.format = prompt
        self.ids: dict[str, int] = {}
        for marker in MARKERS if prompt.reasons else CHAT_MARKERS:
            token = tokenizer.token_to_id(marker)
            if token is None:
                raise SchemaError(f"the tokenizer has no token {marker!r}; add it and train or export again")
            self.ids[marker] = token
        tokenizer.encode_special_tokens = True  # as plain words: markers are placed by id, never by their spelling
        self._head: Callable[[str], tuple[int, ...]] = lru_cache(HEADS)(self._head_of)
        tail = [self.ids[STOP], *self.words("\n"), self.ids[TURN_START], *self.words("assistant\n")]
        self._tail = [*tail, self.ids[DISC_EMB]] if prompt.reasons else [*tail, *tokenizer.encode("").ids]

    def prompt(
        self,
        instruction: str,
        text: str,
        *,
        image_tokens: Sequence[int] = (),
        video_tokens: Sequence[tuple[float, int]] = (),
    ) -> list[int]:
        """Return the ids of a prompt, up to and including the token whose state is the embedding.

        `image_tokens` holds the visual tokens of each image; `video_tokens` the time in seconds and the visual tokens
        of each temporal patch, which Qwen3-VL writes as "<1.5 seconds>" before the patch.
        """
        images = [token for count in image_tokens for token in self._visual(IMAGE_PAD, count)]
        video = []
        for seconds, count in video_tokens:
            video += [*self.words(f"<{seconds:.1f} seconds>"), *self._visual(VIDEO_PAD, count)]
        head = self._head(instruction)
        if self.format.reasons:
            return [*head, *images, *video, *self.words(text), *self._tail]
        if images or video:
            return [*head, *self.words("\n"), *video, *images, *self.words(text), *self._tail]
        return [*head, *self.words("\n" + (text or "NULL")), *self._tail]  # a line end joins those that follow it

    def head(self, instruction: str) -> int:
        """Return how many ids of a prompt come before its input: system message and instruction."""
        return len(self._head(instruction))

    def _head_of(self, instruction: str) -> tuple[int, ...]:
        turn, stop, newline = self.ids[TURN_START], self.ids[STOP], self.words("\n")
        if self.format.reasons:
            system, user = self.format.system, "user\n"
        else:
            system, user = _ended(instruction) or self.format.system, "user"
        ids = [turn, *self.words("system\n"), *self.words(system), stop, *newline, turn, *self.words(user)]
        if self.format.reasons and instruction:
            ids += self.words(instruction + "\n")
        return tuple(ids)

    def rationale(self, words: str) -> list[int]:
        """Return the ids of a whole reasoning path: `<think>`, the words, `</think>`, `<|gen_emb|>`."""
        return [self.ids[THINK], *self.words(words), self.ids[END_THINK], self.ids[GEN_EMB]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of a rationale's ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def words(self, text: str) -> list[int]:
        """Return the ids of a caller's or a model's words, in which no special token is recognised."""
        return [
            token
            for piece in _SPELT_MARKER.split(text)
            for token in self.tokenizer.encode(piece, add_special_tokens=False).ids
        ]

    def _visual(self, pad: str, count: int) -> list[int]:
        return [self.ids[VISION_START], *[self.ids[pad]] * count, self.ids[VISION_END]]


def _ended(instruction: str) -> str:
    """Return an instruction with a full stop where no punctuation ends it, as Qwen3-VL-Embedding was trained."""
    instruction = instruction.strip()
    ends = not instruction or unicodedata.category(instruction[-1]).startswith("P")
    return instruction if ends else f"{instruction}."
