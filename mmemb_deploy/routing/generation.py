"""The reasoning path: continue from a prompt's KV cache, through a rationale, to the embedding at `<|gen_emb|>`.

Nothing is prefilled twice: the first token that enters the decoder here is `<think>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmemb_deploy.backends.protocol import Cache, Decoder, Extended
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.prompts import END_THINK, GEN_EMB, PAD, PATH_MARKERS, THINK, PromptEncoder
from mmemb_deploy.routing.items import Item, Reasoned


@dataclass
class _Live:
    """A row that is still being decoded."""

    index: int
    token: int  # to be fed next
    token_ids: list[int] = field(default_factory=list)
    truncated: bool = False


Choose = Callable[[Floats], Ints]  # logits (B, W) to the next token of every row (B,)


class Generator:
    """Decoding over a batch in which finished rows leave."""

    def __init__(self, decoder: Decoder[Any], prompt: PromptEncoder) -> None:
        self._decoder = decoder
        self._prompt = prompt
        self._marker_ids = frozenset(prompt.ids.values())

    @property
    def most_rows(self) -> int:
        """Most rows that are decoded together."""
        return self._decoder.most_rows

    def generate(self, caches: Sequence[Cache], max_tokens: int, choose: Choose | None = None) -> list[Reasoned]:
        """Write a rationale of at most `max_tokens` tokens for every row of the caches and embed it, a token a step.

        `choose` chooses the next tokens, None the likeliest. Any marker that is chosen closes the rationale, as
        `</think>` does.
        """
        with self._decoder.stack(caches, max_tokens + PATH_MARKERS) as cache:
            return self._write(cache, max_tokens, choose)

    def _write(self, cache: Any, max_tokens: int, choose: Choose | None) -> list[Reasoned]:
        end_think, gen_emb = self._prompt.ids[END_THINK], self._prompt.ids[GEN_EMB]
        finished: dict[int, Reasoned] = {}
        live = [_Live(index, self._prompt.ids[THINK]) for index in range(len(cache))]
        while live:
            ending = [place for place, row in enumerate(live) if row.token == gen_emb]
            step = self._feed(cache, [[row.token] for row in live], ending)
            cache = step.cache
            for place, embedding_D in zip(ending, step.embeddings, strict=True):
                row = live[place]
                finished[row.index] = Reasoned(embedding_D, row.token_ids, row.truncated)
            next_B = step.next_token_B if choose is None else choose(step.logits())
            if ending:
                kept = [place for place in range(len(live)) if place not in ending]
                live, next_B = [live[place] for place in kept], next_B[kept]
                cache = cache.take(kept) if kept else cache
            for row, chosen in zip(live, next_B.tolist(), strict=True):
                if row.token == end_think:
                    row.token = gen_emb
                elif chosen in self._marker_ids:
                    row.token = end_think
                elif len(row.token_ids) == max_tokens:
                    row.token, row.truncated = end_think, True
                else:
                    row.token = chosen
                    row.token_ids.append(chosen)
        return [finished[index] for index in range(len(finished))]

    def follow(self, caches: Sequence[Cache], rationales: Sequence[Sequence[int]]) -> list[Reasoned]:
        """Embed given rationales, one per row of the caches, in a single pass over their tokens."""
        paths = [self._prompt.path(token_ids) for token_ids in rationales]
        with self._decoder.stack(caches, max(map(len, paths))) as cache:
            step = self._feed(cache, paths, range(len(paths)))
        return [
            Reasoned(embedding_D, list(token_ids), truncated=False)
            for embedding_D, token_ids in zip(step.embeddings, rationales, strict=True)
        ]

    def _feed(self, cache: Any, tokens: Sequence[Sequence[int]], embedded: Sequence[int]) -> Extended[Any]:
        """Run every row's tokens after the cache, and embed some rows."""
        lengths_B = np.array([len(row) for row in tokens], np.int64)
        token_ids_BT: Ints = np.full((len(tokens), int(lengths_B.max())), self._prompt.ids[PAD], np.int64)
        for index, row in enumerate(tokens):
            token_ids_BT[index, : len(row)] = row
        return self._decoder.extend(cache, token_ids_BT, lengths_B, embedded)


class OwnWriter:
    """The bundle's own generator."""

    name = "bundle"

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def write(self, items: Sequence[Item], caches: Sequence[Cache], max_tokens: int) -> list[Reasoned | str]:
        """Write greedily, token by token."""
        del items
        return [*self._generator.generate(caches, max_tokens)]


class CallersWriter:
    """The caller, who brought the rationales."""

    name = "caller"

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def write(self, items: Sequence[Item], caches: Sequence[Cache], max_tokens: int) -> list[Reasoned | str]:
        """Follow what was given, in one pass, however long it is."""
        del max_tokens
        return [*self._generator.follow(caches, [item.given or [] for item in items])]
