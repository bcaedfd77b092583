"""A cache that stays on the device gives what a cache in host memory gives, whatever is stacked, taken and extended.

The device here is the host: addresses are real, and ONNX Runtime reads and writes them.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import DTypeLike, NDArray

from mmemb_deploy import Embedder
from mmemb_deploy.backends.device import ALIGNMENT, Plane, Shape
from mmemb_deploy.backends.kv_cache.device import BUCKET, DeviceCache, ResidentDecoder
from mmemb_deploy.backends.onnxruntime import OnnxRuntime
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts
from mmemb_deploy.embedder import row_encoder
from mmemb_deploy.errors import BackendError
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.prompts import PAD
from mmemb_deploy.inputs.rows import Batch, collate
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.routing.vision import VisionEncoder


class HostMemory:
    """Bytes of a numpy array, aligned as device memory is."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._bytes = np.zeros(nbytes + ALIGNMENT, np.uint8)
        self.address = self._bytes.ctypes.data + -self._bytes.ctypes.data % ALIGNMENT


class HostDevice:
    """The host as a device; it counts the bytes that came from and went to numpy arrays."""

    def __init__(self) -> None:
        self.moved = 0

    def allocate(self, nbytes: int) -> HostMemory:
        return HostMemory(nbytes)

    def upload(self, array: NDArray[Any], memory: HostMemory) -> None:
        assert array.nbytes <= memory.nbytes
        contiguous = np.ascontiguousarray(array)
        ctypes.memmove(memory.address, contiguous.ctypes.data, contiguous.nbytes)
        self.moved += array.nbytes

    def download(self, memory: HostMemory, shape: Shape, dtype: DTypeLike) -> NDArray[Any]:
        found = read(memory.address, shape, np.dtype(dtype)).copy()
        assert found.nbytes <= memory.nbytes
        self.moved += found.nbytes
        return found

    def copy(self, source: Plane, target: Plane, width: int, height: int) -> None:
        assert width <= source.pitch
        assert width <= target.pitch
        for line in range(height):
            ctypes.memmove(target.address + line * target.pitch, source.address + line * source.pitch, width)


class HostEngine:
    """A graph in ONNX Runtime between addresses; it remembers the shapes and addresses of every run."""

    def __init__(self, graph: Path, facts: GraphFacts) -> None:
        self._session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self._dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in facts.inputs}
        self.inputs = frozenset(self._dtypes)
        self.runs: list[tuple[dict[str, Shape], dict[str, int]]] = []

    def start(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        assert set(shapes) == self.inputs
        assert all(address % ALIGNMENT == 0 for address in addresses.values())
        feeds = {name: read(addresses[name], shape, self._dtypes[name]) for name, shape in shapes.items()}
        names = [output.name for output in self._session.get_outputs()]
        for name, value in zip(names, self._session.run(names, feeds), strict=True):
            array = np.ascontiguousarray(value)
            ctypes.memmove(addresses[name], array.ctypes.data, array.nbytes)
        self.runs.append((dict(shapes), dict(addresses)))


def read(address: int, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
    nbytes = dtype.itemsize * int(np.prod(shape))
    content = memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
    return np.frombuffer(content, dtype).reshape(shape)


class Both:
    """A bundle's decoder in host memory, and the same over a device."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.host = OnnxRuntime(1).load(bundle)
        self.device = HostDevice()
        self.embedder, self.generator = (
            HostEngine(bundle.graph(name), manifest.graphs[name]) for name in (abi.EMBEDDER, abi.GENERATOR)
        )
        self.resident = ResidentDecoder(self.device, self.embedder, self.generator, manifest.model, 4)

    def batch(self, inputs: Sequence[Any]) -> tuple[Batch, Any, Any]:
        manifest = self.bundle.manifest
        encoder = row_encoder(self.bundle)
        rows = [encoder.row(parse(each, manifest.limits), "Find it.") for each in inputs]
        vision = VisionEncoder(
            self.host.vision,
            manifest.vision,
            hidden_size=manifest.model.hidden_size,
            levels=manifest.model.deepstack_levels,
            max_patches=4096,
            cache_bytes=0,
        )
        batch = collate(rows, manifest.markers[PAD])
        return batch, *vision.encode(batch.visuals)


@pytest.fixture(scope="module")
def both(tiny_bundle: Path) -> Both:
    return Both(Bundle.open(tiny_bundle))


def close(ours: NDArray[Any], theirs: NDArray[Any]) -> bool:
    return bool(np.allclose(ours, theirs, atol=2e-5))


def tokens(*rows: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad rows on the right; return token ids and lengths."""
    lengths_B = np.array([len(row) for row in rows], np.int64)
    ids_BT = np.zeros((len(rows), lengths_B.max()), np.int64)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row)] = row
    return ids_BT, lengths_B


def test_a_prefill_gives_the_same_embeddings_and_states(both: Both, mixed_inputs: list[Any]) -> None:
    prompt = both.batch(mixed_inputs)
    ours, theirs = both.resident.prefill(*prompt), both.host.decoder.prefill(*prompt)
    assert close(ours.embeddings_BD, theirs.embeddings_BD)
    assert close(ours.states_BD, theirs.states_BD)
    assert len(ours.cache) == len(mixed_inputs)


def test_steps_after_a_stack_and_a_take_give_the_same_logits(both: Both, mixed_inputs: list[Any]) -> None:
    """Rows of two batches are stacked, decoded, some leave, and the rest is decoded on."""
    halves = [both.batch(mixed_inputs[:4]), both.batch(mixed_inputs[4:])]
    ours = [both.resident.prefill(*half).cache for half in halves]
    theirs = [both.host.decoder.prefill(*half).cache for half in halves]
    with (
        both.resident.stack([ours[0].take([3, 1, 2]), ours[1]], 9) as first,
        both.host.decoder.stack([theirs[0].take([3, 1, 2]), theirs[1]], 9) as second,
    ):
        pair = first, second
        for step in range(6):
            if step == 3:
                pair = pair[0].take([0, 2, 3, 5]), pair[1].take([0, 2, 3, 5])
            ids_BT, lengths_B = tokens(*([7 * step + row + 5] for row in range(len(pair[0]))))
            extended = both.resident.extend(pair[0], ids_BT, lengths_B)
            expected = both.host.decoder.extend(pair[1], ids_BT, lengths_B)
            assert close(extended.logits_BW, expected.logits_BW)
            assert close(extended.embeddings_BD, expected.embeddings_BD)
            pair = extended.cache, expected.cache


def test_rationales_of_several_lengths_give_the_same_embeddings(both: Both, mixed_inputs: list[Any]) -> None:
    prompt = both.batch(mixed_inputs[:3])
    ids_BT, lengths_B = tokens([5, 6, 7, 8, 9], [11], [21, 22, 23])
    found = []
    for decoder in (both.resident, both.host.decoder):
        with decoder.stack([decoder.prefill(*prompt).cache], 6) as cache:
            longer = decoder.extend(cache, ids_BT, lengths_B).cache
            found.append(decoder.extend(longer, *tokens([31], [32], [33])))  # after padding between tokens
    assert close(found[0].embeddings_BD, found[1].embeddings_BD)
    assert close(found[0].logits_BW, found[1].logits_BW)


def test_every_step_repeats_the_shapes_and_addresses_of_the_one_before(both: Both, mixed_inputs: list[Any]) -> None:
    """So that one CUDA graph serves them all."""
    with both.resident.stack([both.resident.prefill(*both.batch(mixed_inputs[:2])).cache], 8) as stacked:
        assert stacked.slots % BUCKET == 0
        both.generator.runs.clear()
        cache = stacked
        for token in range(8):
            cache = both.resident.extend(cache, *tokens([token], [token + 1])).cache
    assert len(both.generator.runs) == 8
    assert all(run == both.generator.runs[0] for run in both.generator.runs)


def test_the_cache_never_passes_through_the_host(both: Both, mixed_inputs: list[Any]) -> None:
    cache = both.resident.prefill(*both.batch(mixed_inputs)).cache
    both.device.moved = 0
    with both.resident.stack([cache.take([0, 1]), cache.take([4])], 4) as stacked:
        assert both.device.moved == 0
        both.resident.extend(stacked, *tokens([5], [6], [7]))
    model = both.bundle.manifest.model
    results = 3 * (model.hidden_size + model.vocabulary_size) * 4
    ids = 3 * (1 + 3 + stacked.slots + 1) * 8  # token ids, three axes of positions, mask
    assert both.device.moved == results + ids


def test_a_taken_row_leaves_its_padding_behind_and_frees_the_rest(both: Both, mixed_inputs: list[Any]) -> None:
    cache = both.resident.prefill(*both.batch(mixed_inputs)).cache
    shortest = int(cache.mask_BR.sum(axis=1).argmin())
    taken = cache.take([shortest])
    assert taken.slots == cache.mask_BR[shortest].sum() < cache.slots
    assert taken.memory.nbytes < cache.memory.nbytes / len(cache)


def test_more_tokens_than_a_cache_has_room_for_are_refused(both: Both, mixed_inputs: list[Any]) -> None:
    cache: DeviceCache = both.resident.prefill(*both.batch(mixed_inputs[:1])).cache
    with pytest.raises(BackendError, match="1 tokens do not fit after"):
        both.resident.extend(cache, *tokens([1]))


def test_an_embedder_over_a_resident_cache_gives_the_same_embeddings(both: Both, mixed_inputs: list[Any]) -> None:
    engine = Engine("resident", both.host.vision, both.resident, both.host.gate)
    ours = Embedder(both.bundle.manifest, row_encoder(both.bundle), engine)
    theirs = Embedder(both.bundle.manifest, row_encoder(both.bundle), both.host)
    routes: list[EncodeOptions] = [
        {"reasoning": "always", "batch_size": 3},
        {"rationales": ["so it is"] * len(mixed_inputs), "batch_size": 3},
    ]
    for options in routes:
        found = ours.encode_detailed(mixed_inputs, **options)
        expected = theirs.encode_detailed(mixed_inputs, **options)
        assert close(found.embeddings, expected.embeddings)
        assert [each and each.rationale_ids for each in found.details] == [
            each and each.rationale_ids for each in expected.details
        ]
