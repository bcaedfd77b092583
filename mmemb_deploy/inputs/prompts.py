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
text that happens to contain "<|image_pad|>" stays a text. A layout is data: what comes before an input, its order, and
what comes after it; `PromptEncoder` turns it into token ids.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from mmemb_deploy.errors import SchemaError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Marker(str):
    """A special token: placed by its id, never by its spelling."""

    __slots__ = ()


DISC_EMB: Final = Marker("<|disc_emb|>")  # its state is the direct embedding, and decides the route
GEN_EMB: Final = Marker("<|gen_emb|>")  # its state is the reasoned embedding
THINK: Final = Marker("<think>")
END_THINK: Final = Marker("</think>")
STOP: Final = Marker("<|im_end|>")  # the alternative to <think> at <|disc_emb|>
IMAGE_PAD: Final = Marker("<|image_pad|>")
VIDEO_PAD: Final = Marker("<|video_pad|>")
VISION_START: Final = Marker("<|vision_start|>")
VISION_END: Final = Marker("<|vision_end|>")
TURN_START: Final = Marker("<|im_start|>")
PAD: Final = Marker("<|endoftext|>")
CHAT_MARKERS: Final = (STOP, IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END, TURN_START, PAD)
MARKERS: Final = (DISC_EMB, GEN_EMB, THINK, END_THINK, *CHAT_MARKERS)

PATH_MARKERS: Final = 3  # `<think>`, `</think>` and `<|gen_emb|>` around a rationale
PREFIXES: Final = 64  # instructions whose prefix is remembered

# Qwen's tokenizers hold `<think>` and `</think>` as plain added tokens, which are matched even where special ones are
# not: a text that spells one is split inside it.
_SPELT_MARKER = re.compile(r"(?<=<)(?=/?think>)")

Pieces = tuple[str, ...]  # markers, and words to be tokenised


@dataclass(frozen=True)
class Layout:
    """How a prompt surrounds an input."""

    markers: tuple[Marker, ...]
    prefix: Callable[[str, str], Pieces]  # of the system message and the instruction
    video_first: bool  # whether video frames come before images
    before_visuals: Pieces
    lone_text: Callable[[str], str]  # a text without images or video
    suffix: Pieces
    closed_by_tokenizer: bool  # whether what the tokenizer puts at the end of a text follows
    reasons: bool  # whether a rationale may follow


def _mmemb_r1_prefix(system: str, instruction: str) -> Pieces:
    asked = (f"{instruction}\n",) if instruction else ()
    return (TURN_START, "system\n", system, STOP, "\n", TURN_START, "user\n", *asked)


def _qwen3_vl_embedding_prefix(system: str, instruction: str) -> Pieces:
    return (TURN_START, "system\n", _ended(instruction) or system, STOP, "\n", TURN_START, "user")


def _ended(instruction: str) -> str:
    """Return an instruction with a full stop where no punctuation ends it, as Qwen3-VL-Embedding was trained."""
    instruction = instruction.strip()
    ends = not instruction or unicodedata.category(instruction[-1]).startswith("P")
    return instruction if ends else f"{instruction}."


_ASSISTANT: Pieces = (STOP, "\n", TURN_START, "assistant\n")
LAYOUTS: Final = {
    "mmemb-r1": Layout(
        markers=MARKERS,
        prefix=_mmemb_r1_prefix,
        video_first=False,
        before_visuals=(),
        lone_text=lambda text: text,
        suffix=(*_ASSISTANT, DISC_EMB),
        closed_by_tokenizer=False,
        reasons=True,
    ),
    "qwen3-vl-embedding": Layout(
        markers=CHAT_MARKERS,
        prefix=_qwen3_vl_embedding_prefix,
        video_first=True,
        before_visuals=("\n",),
        lone_text=lambda text: "\n" + (text or "NULL"),  # one piece: a line end joins those that follow it
        suffix=_ASSISTANT,
        closed_by_tokenizer=True,
        reasons=False,
    ),
}


@dataclass(frozen=True)
class PromptFormat:
    """The words around an input: the system message, and the instructions for queries and documents."""

    system: str
    query_instruction: str
    document_instruction: str
    layout: Literal["mmemb-r1", "qwen3-vl-embedding"] = "mmemb-r1"

    def asked(self, instruction: str | None) -> str:
        """Return a query's instruction as given, or the default where none is."""
        return self.query_instruction if instruction is None else instruction

    @property
    def reasons(self) -> bool:
        """Whether the layout has a reasoning path."""
        return LAYOUTS[self.layout].reasons


class PromptEncoder:
    """Turns the parts of an input into token ids. Raises SchemaError if the tokenizer lacks a marker."""

    def __init__(self, tokenizer: Tokenizer, prompt: PromptFormat) -> None:
        self.tokenizer = tokenizer
        self.format = prompt
        self.layout = LAYOUTS[prompt.layout]
        self.ids: dict[str, int] = {}
        for marker in self.layout.markers:
            token = tokenizer.token_to_id(marker)
            if token is None:
                raise SchemaError(f"the tokenizer has no token {str(marker)!r}; add it and train or export again")
            self.ids[marker] = token
        tokenizer.encode_special_tokens = True  # as plain words: markers are placed by id, never by their spelling
        self._prefix: Callable[[str], list[int]] = lru_cache(PREFIXES)(self._prefix_of)
        closing = tokenizer.encode("").ids if self.layout.closed_by_tokenizer else []
        self._suffix = [*self._encode(self.layout.suffix), *closing]

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
        layout, prefix = self.layout, self._prefix(instruction)
        images = [token for count in image_tokens for token in self._visual(IMAGE_PAD, count)]
        video: list[int] = []
        for seconds, count in video_tokens:
            video += [*self.tokenize(f"<{seconds:.1f} seconds>"), *self._visual(VIDEO_PAD, count)]
        if not (images or video):
            return [*prefix, *self.tokenize(layout.lone_text(text)), *self._suffix]
        visuals = [*video, *images] if layout.video_first else [*images, *video]
        return [*prefix, *self._encode(layout.before_visuals), *visuals, *self.tokenize(text), *self._suffix]

    def prefix_length(self, instruction: str) -> int:
        """Return how many ids of a prompt come before its input: system message and instruction."""
        return len(self._prefix(instruction))

    def path(self, rationale_ids: Sequence[int]) -> list[int]:
        """Return the reasoning path that follows a prompt: `<think>`, a rationale's ids, `</think>`, `<|gen_emb|>`."""
        return [self.ids[THINK], *rationale_ids, self.ids[END_THINK], self.ids[GEN_EMB]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of a rationale's ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a caller's or a model's words, in which no special token is recognised."""
        return [
            token
            for piece in _SPELT_MARKER.split(text)
            for token in self.tokenizer.encode(piece, add_special_tokens=False).ids
        ]

    def _prefix_of(self, instruction: str) -> list[int]:
        return self._encode(self.layout.prefix(self.format.system, instruction))

    def _encode(self, pieces: Pieces) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += [self.ids[piece]] if isinstance(piece, Marker) else self.tokenize(piece)
        return ids

    def _visual(self, pad: Marker, count: int) -> list[int]:
        return [self.ids[VISION_START], *[self.ids[pad]] * count, self.ids[VISION_END]]
