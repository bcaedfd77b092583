"""A decoder over two sessions whose KV cache is plain arrays in host memory: torch modules, which make a longer one.

Axes as in `protocol`; K cached tokens, H key-value heads, E head size.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.protocol import Extended, Prefilled, Session
from mmemb_deploy.bundle import abi
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.rows import Batch


@dataclass(frozen=True)
class HostCache:
    """Keys and values of every layer, (B, H, K, E) each, in the order of `abi.past_names`.

    Rows are padded on the right; `mask_BK` hides the padding, so that new tokens can follow at K whatever a row's own
    length is.
    """

    tensors: tuple[NDArray[Any], ...]
    mask_BK: Ints
    next_position_B: Ints  # rotary position of the token that follows each row

    def __len__(self) -> int:
        return len(self.mask_BK)

    def take(self, rows: Sequence[int]) -> HostCache:
        """Return a copy of some rows, without the padding that none of them needs."""
        mask_BK = self.mask_BK[rows]
        used = int(np.flatnonzero(mask_BK.any(axis=0))[-1]) + 1
        tensors = tuple(tensor[rows, :, :used] for tensor in self.tensors)
        return HostCache(tensors, mask_BK[:, :used], self.next_position_B[rows])

    def split(self) -> list[HostCache]:
        """Return a view of every row, without its padding."""
        return [
            HostCache(
                tuple(tensor[row : row + 1, :, :used] for tensor in self.tensors),
                self.mask_BK[row : row + 1, :used],
                self.next_position_B[row : row + 1],
            )
            for row, used in enumerate((self.mask_BK.shape[1] - self.mask_BK[:, ::-1].argmax(axis=1)).tolist())
        ]

    def joined(self, others: Sequence[HostCache]) -> HostCache:
        """Return a copy of these rows and those of others, padded to the longest."""
        caches = (self, *others)
        longest = max(cache.mask_BK.shape[1] for cache in caches)
        padded = [cache.padded(longest) for cache in caches]
        return HostCache(
            tuple(np.concatenate(layer) for layer in zip(*(cache.tensors for cache in padded), strict=True)),
            np.concatenate([cache.mask_BK for cache in padded]),
            np.concatenate([cache.next_position_B for cache in padded]),
        )

    def padded(self, length: int) -> HostCache:
        """Return the cache with masked tokens up to `length`."""
        extra = length - self.mask_BK.shape[1]
        tensors = tuple(np.pad(tensor, ((0, 0), (0, 0), (0, extra), (0, 0))) for tensor in self.tensors)
        return HostCache(tensors, np.pad(self.mask_BK, ((0, 0), (0, extra))), self.next_position_B)


class HostDecoder:
    """`embedder` and `generator` read and write the tensors of `mmemb_training.parts`."""

    most_rows = sys.maxsize

    def __init__(self, embedder: Session, generator: Session | None, layers: int) -> None:
        self._embedder, self._generator = embedder, generator
        self._past = tuple(abi.past_names(layers))
        self._present = tuple(abi.present_names(layers))

    def fits(self, rows: int, tokens: int, *, after: int | None) -> bool:
        """Return True: nothing is sized ahead."""
        del rows, tokens, after
        return True

    def prefill(self, batch: Batch, visual: Mapping[str, Floats], *, keep: bool = True) -> Prefilled[HostCache]:
        """Run prompts."""
        outputs = self._embedder.run(
            {
                abi.TOKEN_IDS: batch.token_ids_BT,
                abi.POSITION_IDS: batch.position_ids_3BT,
                abi.MASK: batch.mask_BT,
                abi.VISUAL_INDEX: batch.visual_index_BT,
                **visual,
            }
        )
        cache = HostCache(tuple(outputs[name] for name in self._present), batch.mask_BT, batch.next_position_B)
        return Prefilled(outputs[abi.EMBEDDING], outputs[abi.STATE], cache if keep else None)

    @contextmanager
    def stack(self, caches: Sequence[HostCache], capacity: int) -> Generator[HostCache]:
        """Give one cache of all rows, padded to the longest; the modules make room themselves."""
        del capacity
        first, *others = caches
        yield first.joined(others)

    def extend(
        self, cache: HostCache, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]
    ) -> Extended[HostCache]:
        """Run new tokens after a cache."""
        assert self._generator is not None
        steps_T = np.arange(token_ids_BT.shape[1])
        positions_BT = cache.next_position_B[:, None] + steps_T
        mask_BK = np.concatenate([cache.mask_BK, (steps_T < lengths_B[:, None]).astype(np.int64)], axis=1)
        outputs = self._generator.run(
            {
                abi.TOKEN_IDS: token_ids_BT,
                abi.POSITION_IDS: np.broadcast_to(positions_BT, (3, *positions_BT.shape)),
                abi.MASK: mask_BK,
                **dict(zip(self._past, cache.tensors, strict=True)),
            }
        )
        present = tuple(outputs[name] for name in self._present)
        grown = HostCache(present, mask_BK, cache.next_position_B + lengths_B)
        embeddings_BD, logits_BW = outputs[abi.EMBEDDING], outputs[abi.LOGITS]
        return Extended(logits_BW.argmax(axis=1), [embeddings_BD[row] for row in embedded], lambda: logits_BW, grown)
