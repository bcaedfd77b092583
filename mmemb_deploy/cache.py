"""The KV cache that the fast path leaves behind and the generation engine continues from.

Axes: B rows, K cached tokens, H key-value heads, E head size. Rows are padded on the right; `mask_BK` hides the
padding, so that new tokens can follow at K whatever a row's own length is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.preprocess import Ints


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, (B, H, K, E) each, in the order of `abi.past_names`."""

    tensors: tuple[NDArray[Any], ...]
    mask_BK: Ints
    next_position_B: Ints  # rotary position of the token that follows each row

    def __len__(self) -> int:
        return len(self.mask_BK)

    def take(self, rows: Sequence[int]) -> KVCache:
        """Return the cache of some rows, without the padding that none of them needs."""
        mask_BK = self.mask_BK[rows]
        used = int(np.flatnonzero(mask_BK.any(axis=0))[-1]) + 1
        tensors = tuple(tensor[rows, :, :used] for tensor in self.tensors)
        return KVCache(tensors, mask_BK[:, :used], self.next_position_B[rows])

    @staticmethod
    def stack(caches: Sequence[KVCache]) -> KVCache:
        """Return one cache of all rows, padded to the longest."""
        longest = max(cache.mask_BK.shape[1] for cache in caches)
        padded = [cache._padded(longest) for cache in caches]
        return KVCache(
            tuple(np.concatenate(layer) for layer in zip(*(cache.tensors for cache in padded), strict=True)),
            np.concatenate([cache.mask_BK for cache in padded]),
            np.concatenate([cache.next_position_B for cache in padded]),
        )

    def _padded(self, length: int) -> KVCache:
        extra = length - self.mask_BK.shape[1]
        tensors = tuple(np.pad(tensor, ((0, 0), (0, 0), (0, extra), (0, 0))) for tensor in self.tensors)
        return KVCache(tensors, np.pad(self.mask_BK, ((0, 0), (0, extra))), self.next_position_B)
