"""Images and frames to visual tokens: grouped by shape, encoded once, and remembered by content.

Axes: N images of one shape, F frames of an image, P patches, r rows of a patch, c bytes of such a row.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, Generic

import numpy as np

from mmemb_deploy.backends.nvtx import marked
from mmemb_deploy.backends.protocol import F, Features, Vision
from mmemb_deploy.inputs.preprocess import VisionSpec, Visual, pixel_segments, vision_tables
from mmemb_deploy.inputs.rows import by_shape


class VisionEncoder:
    """Runs a vision graph on what its cache does not remember."""

    def __init__(self, vision: Vision[Any], spec: VisionSpec, cache: FeatureCache[Any]) -> None:
        self._vision = vision
        self._spec = spec
        self.cache = cache

    def encode(self, visuals: Sequence[Visual]) -> Mapping[str, Any]:
        """Return what `Vision.join` makes of the visuals in order."""
        with marked("vision"):
            return self._encode(visuals)

    def _encode(self, visuals: Sequence[Visual]) -> Mapping[str, Any]:
        keys = [_key(visual) for visual in visuals]
        found = {key: features for key in keys if (features := self.cache.get(key)) is not None}
        unseen = {key: visual for key, visual in zip(keys, visuals, strict=True) if key not in found}
        for key, features in self._run(unseen):
            found[key] = features
            self.cache.add(key, features)
        return self._vision.join([found[key] for key in keys])

    def _run(self, visuals: Mapping[bytes, Visual]) -> Iterator[tuple[bytes, Features]]:
        keys, images = list(visuals), list(visuals.values())
        for indices in by_shape(images):
            frames, (grid_h, grid_w) = len(images[indices[0]].pixels_THWC), images[indices[0]].grid
            tables = vision_tables(grid_h, grid_w, self._spec)
            step = self._vision.most_images(frames, grid_h * grid_w)
            for begin in range(0, len(indices), step):
                chunk = indices[begin : begin + step]
                pixels_NFPrc = pixel_segments([images[index] for index in chunk], self._spec)
                features = self._vision.run(pixels_NFPrc, tables)
                yield from zip((keys[index] for index in chunk), features, strict=True)


class FeatureCache(Generic[F]):
    """Features by their image's content; the least recently used leave when the bytes exceed the bound."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._features: OrderedDict[bytes, F] = OrderedDict()
        self._bytes = 0
        self.asked = self.found = 0  # images
        self._lock = Lock()  # threads share an embedder

    def get(self, key: bytes) -> F | None:
        """Return what is remembered of an image, None if it is nothing."""
        with self._lock:
            self.asked += 1
            if key not in self._features:
                return None
            self.found += 1
            self._features.move_to_end(key)
            return self._features[key]

    def add(self, key: bytes, features: F) -> None:
        """Remember the features of an image, unless they alone exceed the bound."""
        if features.nbytes > self._bound:
            return
        with self._lock:
            if key in self._features:
                return
            self._features[key] = features
            self._bytes += features.nbytes
            while self._bytes > self._bound:
                self._bytes -= self._features.popitem(last=False)[1].nbytes


def _key(visual: Visual) -> bytes:
    pixels_THWC = np.ascontiguousarray(visual.pixels_THWC)
    digest = hashlib.blake2b(pixels_THWC.data, digest_size=16)
    digest.update(repr(pixels_THWC.shape).encode())
    return digest.digest()
