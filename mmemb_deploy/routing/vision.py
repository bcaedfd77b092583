"""Images and frames to visual tokens: grouped by grid, encoded once, and remembered by content.

Axes: M visual tokens of an image, V those of a batch and a first row of zeros, L DeepStack levels, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmemb_deploy.backends.protocol import Session
from mmemb_deploy.bundle import abi
from mmemb_deploy.inputs.preprocess import Floats, VisionSpec, Visual, patches, vision_tables
from mmemb_deploy.inputs.rows import by_grid


@dataclass(frozen=True)
class Features:
    """What the vision graph makes of one image: tokens (M, D) and DeepStack levels (L, M, D)."""

    tokens_MD: Floats
    deepstack_LMD: Floats

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.tokens_MD.nbytes + self.deepstack_LMD.nbytes


class VisionEncoder:
    """Runs the vision graph. `max_patches` bounds a run, `cache_bytes` the features that are remembered."""

    def __init__(
        self, session: Session, spec: VisionSpec, *, hidden_size: int, levels: int, max_patches: int, cache_bytes: int
    ) -> None:
        self._session = session
        self._spec = spec
        self._hidden_size, self._levels = hidden_size, levels
        self._max_patches = max_patches
        self._cache = FeatureCache(cache_bytes)

    def encode(self, visuals: Sequence[Visual]) -> dict[str, Floats]:
        """Return the tokens (V, D) and DeepStack levels (L, V, D) of the visuals in order, after a zero row."""
        keys = [_key(visual) for visual in visuals]
        unseen = {key: visual for key, visual in zip(keys, visuals, strict=True) if key not in self._cache}
        found = {key: self._cache[key] for key in keys if key not in unseen}
        found |= self._run(unseen)
        for key in unseen:
            self._cache.add(key, found[key])
        first_1D = np.zeros((1, self._hidden_size), np.float32)
        first_L1D = np.zeros((self._levels, *first_1D.shape), np.float32)
        return {
            abi.VISUAL_TOKENS: np.concatenate([first_1D, *(found[key].tokens_MD for key in keys)]),
            abi.DEEPSTACK: np.concatenate([first_L1D, *(found[key].deepstack_LMD for key in keys)], axis=1),
        }

    def _run(self, visuals: Mapping[bytes, Visual]) -> dict[bytes, Features]:
        keys, images = list(visuals), list(visuals.values())
        features = {}
        for (grid_h, grid_w), indices in by_grid(images).items():
            tables = vision_tables(grid_h, grid_w, self._spec)
            step = max(1, self._max_patches // (grid_h * grid_w))
            for begin in range(0, len(indices), step):
                chunk = indices[begin : begin + step]
                outputs = self._session.run(
                    {
                        abi.PATCHES: np.stack([patches(images[index], self._spec) for index in chunk]),
                        abi.INTERPOLATION_INDEX: tables.interpolation_index_P4,
                        abi.INTERPOLATION_WEIGHT: tables.interpolation_weight_P4,
                        abi.ROTARY_COS: tables.rotary_cos_PD,
                        abi.ROTARY_SIN: tables.rotary_sin_PD,
                    }
                )
                tokens_NMD = outputs[abi.VISUAL_TOKENS]
                none_LNMD = np.zeros((0, *tokens_NMD.shape), np.float32)
                deepstack_LNMD = outputs[abi.DEEPSTACK] if self._levels else none_LNMD
                for image, index in enumerate(chunk):
                    features[keys[index]] = Features(tokens_NMD[image], deepstack_LNMD[:, image])
        return features


class FeatureCache:
    """Features by their image's content; the least recently used leave when the bytes exceed the bound."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._features: OrderedDict[bytes, Features] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._features

    def __getitem__(self, key: bytes) -> Features:
        self._features.move_to_end(key)
        return self._features[key]

    def add(self, key: bytes, features: Features) -> None:
        """Remember a copy, unless it alone exceeds the bound."""
        if features.nbytes > self._bound:
            return
        self._features[key] = Features(features.tokens_MD.copy(), features.deepstack_LMD.copy())
        self._bytes += features.nbytes
        while self._bytes > self._bound:
            self._bytes -= self._features.popitem(last=False)[1].nbytes


def _key(visual: Visual) -> bytes:
    pixels_THWC = np.ascontiguousarray(visual.pixels_THWC)
    digest = hashlib.blake2b(pixels_THWC.data, digest_size=16)
    digest.update(repr(pixels_THWC.shape).encode())
    return digest.digest()
