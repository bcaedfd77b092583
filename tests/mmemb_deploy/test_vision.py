"""An image is encoded once: its features are remembered by content, within a bound, where the backend computes."""

from typing import Any

import numpy as np
import pytest

from mmemb_deploy import Embedder
from mmemb_deploy.backends.host_vision import HostFeatures
from mmemb_deploy.routing.vision import FeatureCache


def features(shade: float) -> HostFeatures:
    """24 bytes."""
    return HostFeatures(np.full((2, 1), shade, np.float32), np.full((2, 2, 1), shade, np.float32))


def test_the_least_recently_used_features_leave_first() -> None:
    cache = FeatureCache[HostFeatures](bound=48)
    cache.add(b"one", features(1))
    cache.add(b"two", features(2))
    found = cache.get(b"one")
    assert found is not None
    assert found.tokens_MD[0, 0] == 1
    cache.add(b"three", features(3))
    assert [cache.get(key) is not None for key in (b"one", b"two", b"three")] == [True, False, True]


def test_features_that_two_threads_add_count_once() -> None:
    cache = FeatureCache[HostFeatures](bound=48)
    for _ in range(3):
        cache.add(b"one", features(1))
    cache.add(b"two", features(2))
    assert cache.get(b"one") is not None


def test_features_above_the_bound_are_not_remembered() -> None:
    cache = FeatureCache[HostFeatures](bound=23)
    cache.add(b"one", features(1))
    assert cache.get(b"one") is None


def test_an_image_is_encoded_once_however_often_it_is_shown(
    tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_embedder.pipeline.fast_path._vision  # pyright: ignore[reportPrivateUsage]
    vision = encoder._vision  # pyright: ignore[reportPrivateUsage]
    images: list[int] = []
    run = vision.run

    def counting(pixels_NTPrc: Any, tables: Any) -> Any:
        images.append(len(pixels_NTPrc))
        return run(pixels_NTPrc, tables)

    monkeypatch.setattr(vision, "run", counting)
    monkeypatch.setattr(encoder, "_cache", FeatureCache[Any](2**20))
    red, blue = np.zeros((2, 16, 16, 3), np.uint8)
    red[..., 0] = blue[..., 2] = 200
    first = tiny_embedder.encode([{"image": red, "text": "a"}, {"images": [blue, red], "text": "b"}], reasoning="never")
    again = tiny_embedder.encode([{"image": red, "text": "a"}, {"images": [blue, red], "text": "b"}], reasoning="never")
    assert images == [2]
    np.testing.assert_array_equal(first, again)
