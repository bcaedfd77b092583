"""An image is encoded once: its features are remembered by content, within a bound."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmemb_deploy import Embedder
from mmemb_deploy.bundle import abi
from mmemb_deploy.routing.vision import FeatureCache, Features


def features(shade: float) -> Features:
    """24 bytes."""
    return Features(np.full((2, 1), shade, np.float32), np.full((2, 2, 1), shade, np.float32))


def test_the_least_recently_used_features_leave_first() -> None:
    cache = FeatureCache(bound=48)
    cache.add(b"one", features(1))
    cache.add(b"two", features(2))
    assert cache[b"one"].tokens_MD[0, 0] == 1
    cache.add(b"three", features(3))
    assert [key in cache for key in (b"one", b"two", b"three")] == [True, False, True]


def test_features_above_the_bound_are_not_remembered() -> None:
    cache = FeatureCache(bound=23)
    cache.add(b"one", features(1))
    assert b"one" not in cache


def test_an_image_is_encoded_once_however_often_it_is_shown(
    tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_embedder.pipeline.fast_path._vision  # pyright: ignore[reportPrivateUsage]
    session = encoder._session  # pyright: ignore[reportPrivateUsage]
    images: list[int] = []

    class Counting:
        def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            images.append(len(inputs[abi.PATCHES]))
            return session.run(inputs)

    monkeypatch.setattr(encoder, "_session", Counting())
    monkeypatch.setattr(encoder, "_cache", FeatureCache(2**20))
    red, blue = np.zeros((2, 16, 16, 3), np.uint8)
    red[..., 0] = blue[..., 2] = 200
    first = tiny_embedder.encode([{"image": red, "text": "a"}, {"images": [blue, red], "text": "b"}], reasoning="never")
    again = tiny_embedder.encode([{"image": red, "text": "a"}, {"images": [blue, red], "text": "b"}], reasoning="never")
    assert images == [2]
    np.testing.assert_array_equal(first, again)
