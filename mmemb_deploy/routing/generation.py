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


def greedy(logits_BW: Floats) -> Ints:
    """Choose the likeliest token."""
    chosen: Ints = logits_BW.argmax(axis=1)
    return chosen


class Generator:
    """Decoding over a batch in which finished rows leave."""

    def __init__(self, decoder: Decoder[Any], prompt: PromptEncoder) -> None:
        self._decoder = decoder
        self._prompt = prompt
        self._marker_ids = frozenset(prompt.ids.values())

    def generate(self, caches: Sequence[Cache], max_tokens: int, choose: Choose = greedy) -> list[Reasoned]:
        """Write a rationale of at most `max_tokens` tokens for every row of the caches and embed it, a token a step.

        Any marker that is chosen closes the rationale, as `</think>` does.
        """
        with self._decoder.stack(caches, max_tokens + PATH_MARKERS) as cache:
            return self._write(cache, max_tokens, choose)

    def _write(self, cache: Any, max_tokens: int, choose: Choose) -> list[Reasoned]:
        end_think, gen_emb = self._prompt.ids[END_THINK], self._prompt.ids[GEN_EMB]
        finished: dict[int, Reasoned] = {}
        live = [_Live(index, self._prompt.ids[THINK]) for index in range(len(cache))]
        while live:
            fed = [row.token for row in live]
            step = self._feed(cache, [[token] for token in fed])
            cache = step.cache
            for row, embedding_D, chosen in zip(live, step.embeddings_BD, choose(step.logits_BW).tolist(), strict=True):
                if row.token == gen_emb:
                    finished[row.index] = Reasoned(embedding_D, row.token_ids, row.truncated)
                elif row.token == end_think:
                    row.token = gen_emb
                elif chosen in self._marker_ids:
                    row.token = end_think
                elif len(row.token_ids) == max_tokens:
                    row.token, row.truncated = end_think, True
                else:
                    row.token = chosen
                    row.token_ids.append(chosen)
            if gen_emb in fed:
                kept = [index for index, token in enumerate(fed) if token != gen_emb]
                live = [live[index] for index in kept]
                cache = cache.take(kept) if kept else cache
        return [finished[index] for index in range(len(finished))]

    def follow(self, caches: Sequence[Cache], rationales: Sequence[Sequence[int]]) -> list[Reasoned]:
        """Embed given rationales, one per row of the caches, in a single pass over their tokens."""
        paths = [self._prompt.path(token_ids) for token_ids in rationales]
        with self._decoder.stack(caches, max(map(len, paths))) as cache:
            step = self._feed(cache, paths)
        return [
            Reasoned(embedding_D, list(token_ids), truncated=False)
            for embedding_D, token_ids in zip(step.embeddings_BD, rationales, strict=True)
        ]

    def _feed(self, cache: Any, tokens: Sequence[Sequence[int]]) -> Extended[Any]:
        """Run every row's tokens after the cache."""
        lengths_B = np.array([len(row) for row in tokens], np.int64)
        token_ids_BT: Ints = np.full((len(tokens), int(lengths_B.max())), self._prompt.ids[PAD], np.int64)
        for index, row in enumerate(tokens):
            token_ids_BT[index, : len(row)] = row
        return self._decoder.extend(cache, token_ids_BT, lengths_B)


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
