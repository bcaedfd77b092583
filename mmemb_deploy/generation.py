"""The reasoning path: continue from a prompt's KV cache, through a rationale, to the embedding at `<|gen_emb|>`.

Nothing is prefilled twice: the first token that enters the decoder here is `<think>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmemb_deploy import abi
from mmemb_deploy.backends.session import Session
from mmemb_deploy.cache import KVCache
from mmemb_deploy.preprocess import Floats, Ints
from mmemb_deploy.prompts import END_THINK, GEN_EMB, PAD, THINK


@dataclass(frozen=True)
class Reasoned:
    """A reasoned embedding (D,), L2-normalised, and the rationale's token ids without its markers."""

    embedding_D: Floats
    token_ids: list[int]
    truncated: bool  # the token limit closed the rationale


@dataclass
class _Live:
    """A row that is still being decoded."""

    place: int
    token: int  # to be fed next
    words: list[int] = field(default_factory=list)
    truncated: bool = False


Choose = Callable[[Floats], Ints]  # logits (B, W) to the next token of every row (B,)


def greedy(logits_BW: Floats) -> Ints:
    """Choose the likeliest token."""
    chosen: Ints = logits_BW.argmax(axis=1)
    return chosen


class Generator:
    """Decoding over a batch in which finished rows leave."""

    def __init__(self, session: Session, *, layers: int, markers: Mapping[str, int]) -> None:
        self._session = session
        self._past = tuple(abi.past_names(layers))
        self._present = tuple(abi.present_names(layers))
        self._markers = dict(markers)
        self._marker_ids = frozenset(markers.values())

    def generate(self, cache: KVCache, max_tokens: int, choose: Choose = greedy) -> list[Reasoned]:
        """Write a rationale of at most `max_tokens` words for every row and embed it, one token a step.

        Any marker that is chosen closes the rationale, as `</think>` does.
        """
        end_think, gen_emb = self._markers[END_THINK], self._markers[GEN_EMB]
        finished: dict[int, Reasoned] = {}
        live = [_Live(place, self._markers[THINK]) for place in range(len(cache))]
        while live:
            fed = [row.token for row in live]
            embeddings_BD, logits_BW, cache = self._step(cache, [[token] for token in fed])
            for row, embedding_D, chosen in zip(live, embeddings_BD, choose(logits_BW).tolist(), strict=True):
                if row.token == gen_emb:
                    finished[row.place] = Reasoned(embedding_D, row.words, row.truncated)
                elif row.token == end_think:
                    row.token = gen_emb
                elif chosen in self._marker_ids:
                    row.token = end_think
                elif len(row.words) == max_tokens:
                    row.token, row.truncated = end_think, True
                else:
                    row.token = chosen
                    row.words.append(chosen)
            if gen_emb in fed:
                kept = [place for place, token in enumerate(fed) if token != gen_emb]
                live = [live[place] for place in kept]
                cache = cache.take(kept) if kept else cache
        return [finished[place] for place in range(len(finished))]

    def follow(self, cache: KVCache, rationales: Sequence[Sequence[int]]) -> list[Reasoned]:
        """Embed given rationales, one per row, in a single pass over their tokens."""
        paths = [
            [self._markers[THINK], *words, self._markers[END_THINK], self._markers[GEN_EMB]] for words in rationales
        ]
        embeddings_BD, _, _ = self._step(cache, paths)
        return [
            Reasoned(embedding_D, list(words), truncated=False)
            for embedding_D, words in zip(embeddings_BD, rationales, strict=True)
        ]

    def _step(self, cache: KVCache, tokens: Sequence[Sequence[int]]) -> tuple[Floats, Floats, KVCache]:
        """Feed every row its tokens; return embeddings (B, D) and logits (B, W) of each row's last, and the cache."""
        lengths_B = np.array([len(row) for row in tokens], np.int64)
        new = int(lengths_B.max())
        token_ids_BT: Ints = np.full((len(tokens), new), self._markers[PAD], np.int64)
        for place, row in enumerate(tokens):
            token_ids_BT[place, : len(row)] = row
        steps_T = np.arange(new)
        positions_BT = cache.next_position_B[:, None] + steps_T
        mask_BK = np.concatenate([cache.mask_BK, (steps_T < lengths_B[:, None]).astype(np.int64)], axis=1)
        outputs = self._session.run(
            {
                abi.TOKEN_IDS: token_ids_BT,
                abi.POSITION_IDS: np.broadcast_to(positions_BT, (3, *positions_BT.shape)),
                abi.MASK: mask_BK,
                **dict(zip(self._past, cache.tensors, strict=True)),
            }
        )
        present = tuple(outputs[name] for name in self._present)
        grown = KVCache(present, mask_BK, cache.next_position_B + lengths_B)
        return outputs[abi.EMBEDDING], outputs[abi.LOGITS], grown
