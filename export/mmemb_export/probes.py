"""Inputs to certify a bundle on: texts, images of many sizes, several images, videos; synthetic, and fixed by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy.evaluation.pairs import Pair

MODALITIES = ("text", "image", "images", "video")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789,.;+-?é漢字🙂"


def synthetic_probes(count: int, seed: int = 0) -> list[Pair]:
    """Return `count` probes, the modalities in turn; images are smooth colour noise of 8 to 200 pixels a side."""
    rng = np.random.default_rng(seed)
    return [
        Pair(query=_content(MODALITIES[place % len(MODALITIES)], rng), candidates=[], relevant=[])
        for place in range(count)
    ]


def _content(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    content: dict[str, Any] = {"text": "".join(rng.choice(list(_ALPHABET), size=int(rng.integers(1, 60))))}
    if kind == "image":
        content["image"] = _noise(_size(rng), rng)
    elif kind == "images":
        content["images"] = [_noise(_size(rng), rng) for _ in range(int(rng.integers(2, 5)))]
    elif kind == "video":
        size = _size(rng)
        content["video"] = [_noise(size, rng) for _ in range(int(rng.integers(2, 7)))]
        content["fps"] = float(rng.choice([1.0, 2.0, 24.0]))
    return content


def _size(rng: np.random.Generator) -> tuple[int, int]:
    width, height = (int(side) for side in rng.integers(8, 200, size=2))
    return width, height


def _noise(size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    small = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), dtype=np.uint8)
