"""An image is encoded once: its features are remembered by content, within a bound, where the backend computes."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy import Embedder
from mmemb_deploy.backends import device_vision
from mmemb_deploy.backends.device import DeviceArray, Shape, Wanted
from mmemb_deploy.backends.device_vision import DeviceVision
from mmemb_deploy.backends.host_device import HostDevice, HostMemory
from mmemb_deploy.backends.host_vision import HostFeatures, HostVision
from mmemb_deploy.backends.onnxruntime import OrtGraph, OrtSession
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.inputs.preprocess import Visual, resize_image, resize_video, vision_tables
from mmemb_deploy.routing.vision import FeatureCache, VisionEncoder


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


class CountingDevice(HostDevice):
    """The host as a device; it counts what it is asked for, and lets nothing come back."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[int] = []  # bytes of each
        self.allocations = 0

    def allocate(self, nbytes: int) -> HostMemory:
        self.allocations += 1
        return super().allocate(nbytes)

    def upload(self, array: NDArray[Any], address: int) -> None:
        self.uploads.append(array.nbytes)
        super().upload(array, address)

    def download(self, wanted: Sequence[Wanted]) -> list[NDArray[Any]]:
        raise AssertionError(f"{wanted} came to the host")


class BoundedGraph(OrtGraph):
    """A graph that takes at most 3 images at once; it notes how many it was given."""

    images: list[int]

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        return shapes[abi.PIXELS][0] <= 3

    def bind(
        self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], *, again: bool = False
    ) -> Callable[[], None]:
        assert self.takes(shapes)
        self.images.append(shapes[abi.PIXELS][0])
        return super().bind(shapes, addresses, again=again)


class Both:
    """A bundle's vision graph with its features in the host's memory, and on a device."""

    def __init__(self, bundle: Bundle) -> None:
        self.manifest = bundle.manifest
        facts = self.manifest.graphs[abi.VISION]
        session = onnxruntime.InferenceSession(bundle.graph(abi.VISION), providers=["CPUExecutionProvider"])
        self.session = OrtSession(facts.file, session)
        self.host = HostVision(self.session, self.manifest)
        self.device, self.graph = CountingDevice(), BoundedGraph(session, facts)
        self.graph.images = []
        self.resident = DeviceVision(self.device, self.graph, self.manifest)

    def encoder(self, cache_bytes: int = 2**20) -> VisionEncoder:
        """Return one over the device."""
        return VisionEncoder(self.resident, self.manifest.vision, FeatureCache(cache_bytes))

    def pictures(self, *sizes: tuple[int, int]) -> list[Visual]:
        """Return noise of some widths and heights."""
        rng = np.random.default_rng(0)
        noise = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
        return [resize_image(Image.fromarray(picture), self.manifest.vision) for picture in noise]

    def clip(self, frames: int, size: tuple[int, int]) -> list[Visual]:
        """Return the temporal patches of a video."""
        rng = np.random.default_rng(1)
        noise = [rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(frames)]
        return resize_video([Image.fromarray(frame) for frame in noise], self.manifest.vision)


@pytest.fixture
def both(tiny_bundle: Path) -> Both:
    return Both(Bundle.open(tiny_bundle))


def read(found: Mapping[str, DeviceArray]) -> dict[str, NDArray[Any]]:
    """Return what is on a device."""
    wanted = [Wanted(array.memory.address, array.shape, np.float32) for array in found.values()]
    return dict(zip(found, HostDevice().download(wanted), strict=True))


def test_features_on_a_device_are_those_of_the_host(both: Both) -> None:
    visuals = [*both.pictures((16, 16), (40, 12), (16, 16), (20, 30)), *both.clip(3, (16, 16))]
    expected = VisionEncoder(both.host, both.manifest.vision, FeatureCache(0)).encode(visuals)
    found = read(both.encoder().encode(visuals))
    assert list(found) == list(expected) == [abi.VISUAL_TOKENS, abi.DEEPSTACK]
    for name, array in found.items():
        assert array.shape[-2] == 1 + sum(visual.tokens for visual in visuals)
        assert not array[..., 0, :].any()
        np.testing.assert_allclose(array, expected[name], atol=1e-5)


def test_only_pixels_go_to_a_device_and_nothing_comes_back(both: Both) -> None:
    encoder = both.encoder()
    first, second = both.pictures((16, 16), (16, 16))
    encoder.encode([first])
    tables = sum(table.nbytes for table in vision_tables(*first.grid, both.manifest.vision).inputs().values())
    assert sum(both.device.uploads) == first.pixels_THWC.nbytes + tables
    both.device.uploads.clear()
    encoder.encode([first, second, first])
    assert both.device.uploads == [second.pixels_THWC.nbytes]


def test_the_tables_of_the_grids_seen_last_stay_on_a_device(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_vision, "GRIDS", 2)
    encoder, uploads = both.encoder(cache_bytes=0), both.device.uploads
    square, wide, high = both.pictures((16, 16), (32, 8), (8, 32))
    for visual in (square, wide, square, high):
        encoder.encode([visual])
    uploads.clear()
    encoder.encode([square])
    assert uploads == [square.pixels_THWC.nbytes]
    encoder.encode([wide])
    assert len(uploads) > 2


def test_text_alone_puts_nothing_on_a_device(both: Both) -> None:
    encoder, before = both.encoder(), both.device.allocations
    nothing = encoder.encode([])
    assert (both.device.allocations, both.device.uploads) == (before, [])
    assert {name: array.shape for name, array in nothing.items()} == {
        abi.VISUAL_TOKENS: (1, 48),
        abi.DEEPSTACK: (2, 1, 48),
    }
    assert not any(array.any() for array in read(nothing).values())


def test_images_are_split_by_what_an_engine_takes(both: Both) -> None:
    visuals = [*both.pictures(*[(16, 16)] * 8), *both.clip(6, (16, 16))]
    both.encoder().encode(visuals)
    assert both.graph.images == [3, 3, 2, 3]  # a video is no image, whatever its grid


def test_images_are_split_by_what_a_bundle_allows(both: Both) -> None:
    batch = both.manifest.batch.model_copy(update={"patches": 33})
    manifest = both.manifest.model_copy(update={"batch": batch})
    host, resident = HostVision(both.session, manifest), DeviceVision(both.device, both.graph, manifest)
    assert [host.most_images(1, patches) for patches in (4, 16, 17, 33, 34)] == [8, 2, 1, 1, 1]
    assert [resident.most_images(1, patches) for patches in (4, 16, 17, 33, 34)] == [3, 2, 1, 1, 1]


def test_an_image_that_is_forgotten_frees_its_memory_alone(both: Both) -> None:
    visuals = both.pictures((16, 16), (16, 16))
    one, two = both.resident.run(
        np.stack([visual.pixels_THWC for visual in visuals]).reshape(2, 1, 16, 4, 12),
        vision_tables(4, 4, both.manifest.vision),
    )
    cache = FeatureCache[Any](bound=one.nbytes)
    memory = weakref.ref(one.memory)
    cache.add(b"one", one)
    del one
    assert memory() is not None
    cache.add(b"two", two)
    assert memory() is None


def test_an_image_is_encoded_once_however_often_it_is_shown(
    tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_embedder.paths.fast_path.vision
    vision = encoder._vision  # pyright: ignore[reportPrivateUsage]
    images: list[int] = []
    run = vision.run

    def counting(pixels_NFPrc: Any, tables: Any) -> Any:
        images.append(len(pixels_NFPrc))
        return run(pixels_NFPrc, tables)

    monkeypatch.setattr(vision, "run", counting)
    monkeypatch.setattr(encoder, "cache", FeatureCache[Any](2**20))
    red, blue = np.zeros((2, 16, 16, 3), np.uint8)
    red[..., 0] = blue[..., 2] = 200
    first = tiny_embedder.encode([{"image": red, "text": "a"}, {"images": [blue, red], "text": "b"}], reasoning="never")
    again = tiny_embedder.encode([{"image": red, "text": "a"}, {"images": [blue, red], "text": "b"}], reasoning="never")
    assert images == [2]
    np.testing.assert_array_equal(first, again)
