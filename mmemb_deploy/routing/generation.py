"""The reasoning path: continue from a prompt's KV cache, through a rationale, to the embedding at `<|gen_emb|>`.

Nothing is prefilled twice: the first token that enters the decoder here is `<think>`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmemb_deploy.backends.protocol import Cache, Decoder, Extended
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.prompts import END_THINK, GEN_EMB, PAD, PATH_MARKERS, THINK, PromptEncoder
from mmemb_deploy.routing.items import Item, Reasoned

Choose = Callable[[Floats], Ints]  # logits (B, W) to the next token of every row (B,)


@dataclass(eq=False)
class Writing:
    """A rationale that is being written: its tokens so far, and its embedding (D,) once it has ended."""

    most: int  # tokens after which it is closed
    token: int  # to be fed next
    leaving: ExitStack  # gives its row back as it came
    token_ids: list[int] = field(default_factory=list)
    truncated: bool = False
    embedding_D: Floats | None = None

    @property
    def reasoned(self) -> Reasoned:
        """Return what was written, once it has ended."""
        assert self.embedding_D is not None
        return Reasoned(self.embedding_D, self.token_ids, self.truncated)


class Decoding:
    """Rows that are decoded together, a token a step; between steps some join, and others leave."""

    def __init__(self, decoder: Decoder[Any], prompt: PromptEncoder, choose: Choose | None) -> None:
        self.rows: list[Writing] = []
        self._decoder, self._ids, self._choose = decoder, prompt.ids, choose
        self._closing = frozenset(prompt.ids.values())
        self._cache: Any = None

    def join(self, caches: Sequence[Cache], most_tokens: Sequence[int]) -> list[Writing]:
        """Begin a rationale of at most so many tokens after each cache of one row.

        The caches must not be extended elsewhere before the rows have left; then they are as they were.
        """
        joining = []
        entered = [] if self._cache is None else [self._cache]
        with ExitStack() as undo:
            for cache, most in zip(caches, most_tokens, strict=True):
                leaving = undo.enter_context(ExitStack())
                entered.append(leaving.enter_context(self._decoder.stack([cache], most + PATH_MARKERS)))
                joining.append(Writing(most, self._ids[THINK], leaving))
            undo.pop_all()
        if joining:
            self._cache = entered[0].joined(entered[1:])
            self.rows += joining
        return joining

    def leave(self, rows: Collection[Writing]) -> None:
        """Let rows go, finished or not."""
        gone = set(rows)
        kept = [place for place, row in enumerate(self.rows) if row not in gone]
        for row in gone:
            row.leaving.close()
        self._cache = self._cache.take(kept) if kept else None
        self.rows = [self.rows[place] for place in kept]

    def step(self) -> list[Writing]:
        """Feed every row its next token; return those that have ended, and left."""
        rows = self.rows
        ending = [place for place, row in enumerate(rows) if row.token == self._ids[GEN_EMB]]
        token_ids_B1 = np.array([[row.token] for row in rows], np.int64)
        step = self._decoder.extend(self._cache, token_ids_B1, np.ones(len(rows), np.int64), ending)
        self._cache = step.cache
        next_B = step.next_token_B if self._choose is None else self._choose(step.logits())
        for row, chosen in zip(rows, next_B.tolist(), strict=True):
            self._go_on(row, chosen)
        ended = [rows[place] for place in ending]
        for row, embedding_D in zip(ended, step.embeddings, strict=True):
            row.embedding_D = embedding_D
        if ended:
            self.leave(ended)
        return ended

    def _go_on(self, row: Writing, chosen: int) -> None:
        """Take a row's next token; any marker closes a rationale, as `</think>` does."""
        if row.token in (self._ids[END_THINK], self._ids[GEN_EMB]):
            row.token = self._ids[GEN_EMB]
        elif chosen in self._closing:
            row.token = self._ids[END_THINK]
        elif len(row.token_ids) == row.most:
            row.token, row.truncated = self._ids[END_THINK], True
        else:
            row.token = chosen
            row.token_ids.append(chosen)


class Generator:
    """A bundle's decoder, where something follows its prompts."""

    def __init__(self, decoder: Decoder[Any], prompt: PromptEncoder) -> None:
        self._decoder = decoder
        self._prompt = prompt

    @property
    def most_rows(self) -> int:
        """Most rows that are decoded together."""
        return self._decoder.most_rows

    def decoding(self, choose: Choose | None = None) -> Decoding:
        """Return a set of rows to be decoded, empty; `choose` chooses next tokens, None the likeliest."""
        return Decoding(self._decoder, self._prompt, choose)

    def generate(self, caches: Sequence[Cache], max_tokens: int, choose: Choose | None = None) -> list[Reasoned]:
        """Write a rationale of at most `max_tokens` tokens for every row of the caches, all together, and embed it."""
        decoding = self.decoding(choose)
        rows = [row for cache in caches for row in cache.split()]
        written = decoding.join(rows, [max_tokens] * len(rows))
        while decoding.rows:
            decoding.step()
        return [row.reasoned for row in written]

    def follow(self, caches: Sequence[Cache], rationales: Sequence[Sequence[int]]) -> list[Reasoned]:
        """Embed given rationales, one per row of the caches, in a single pass over their tokens."""
        paths = [self._prompt.path(token_ids) for token_ids in rationales]
        with self._decoder.stack(caches, max(map(len, paths))) as cache:
            step = self._feed(cache, paths)
        return [
            Reasoned(embedding_D, list(token_ids), truncated=False)
            for embedding_D, token_ids in zip(step.embeddings, rationales, strict=True)
        ]

    def _feed(self, cache: Any, tokens: Sequence[Sequence[int]]) -> Extended[Any]:
        """Run every row's tokens after the cache, and embed all rows."""
        lengths_B = np.array([len(row) for row in tokens], np.int64)
        token_ids_BT: Ints = np.full((len(tokens), int(lengths_B.max())), self._prompt.ids[PAD], np.int64)
        for index, row in enumerate(tokens):
            token_ids_BT[index, : len(row)] = row
        return self._decoder.extend(cache, token_ids_BT, lengths_B, range(len(tokens)))


class CallersWriter:
    """The caller, who brought the rationales."""

    name = "caller"

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def write(self, items: Sequence[Item], caches: Sequence[Cache], max_tokens: int) -> list[Reasoned | str]:
        """Follow what was given, in one pass, however long it is."""
        del max_tokens
        return [*self._generator.follow(caches, [item.given or [] for item in items])]
