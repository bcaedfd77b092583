"""A cache of slots gives what a cache of whole arrays gives, whatever joins, leaves, waits, moves and is followed.

The same decoder runs four ways: torch's modules over whole arrays, the portable and the fused graphs over slots on the
host, and the portable one as it is prepared for TensorRT. A padded device lays rows out as a GPU does, and counts what
is copied.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmemb_deploy import Embedder
from mmemb_deploy.backends.device import ALIGNMENT, Plane, RecordError, Wanted
from mmemb_deploy.backends.host_device import HostDevice, HostMemory
from mmemb_deploy.backends.kv_cache.pool import BUCKET, Layout, Pool, Row
from mmemb_deploy.backends.kv_cache.slots import Places, SlotDecoder, windows
from mmemb_deploy.backends.onnxruntime import SPIN, OnnxRuntime, OrtGraph, open_graph
from mmemb_deploy.backends.protocol import Decoder, Engine
from mmemb_deploy.backends.tensorrt.files import WINDOW
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts, TensorFacts
from mmemb_deploy.errors import BackendError
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.prompts import PAD
from mmemb_deploy.inputs.rows import Batch, collate
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.preparer import row_encoder
from mmemb_engines.graph import prepared, write_prepared
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.runtime import torch_embedder


class Counting(HostDevice):
    """The host, and what passed through it: bytes up, down and inside, memory asked for, and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def _count(self, what: str, amount: int) -> None:
        self.counts[what] = self.counts.get(what, 0) + amount

    def allocate(self, nbytes: int) -> HostMemory:
        self._count("allocated", nbytes)
        return super().allocate(nbytes)

    def upload(self, array: NDArray[Any], address: int) -> None:
        self._count("up", array.nbytes)
        super().upload(array, address)

    def download(self, wanted: Sequence[Wanted]) -> list[NDArray[Any]]:
        found = super().download(wanted)
        self._count("down", sum(each.nbytes for each in found))
        self._count("waits", 1)
        return found

    def copy(self, source: Plane, target: Plane, width: int, height: int) -> None:
        self._count("inside", width * height)
        self._count("copies", 1)
        super().copy(source, target, width, height)

    def record(self, start: Callable[[], None]) -> Callable[[], None]:
        self._count("recorded", 1)
        return super().record(start)


class Setting:
    """One bundle's decoder over a device, and prompts for it."""

    def __init__(self, bundle: Bundle, places: Places | None = None) -> None:
        manifest = bundle.manifest
        self.bundle, self.device = bundle, Counting()
        self.engine = OnnxRuntime(1).load(bundle)
        if places is None:
            self.decoder: SlotDecoder = self.engine.decoder  # type: ignore[assignment]
            return
        sessions: dict[str, Any] = {}
        graphs: dict[str, OrtGraph] = {}
        for name, facts in manifest.graphs.items():
            path = bundle.folder / facts.file
            if places.windows and any("slots" in tensor.shape for tensor in facts.inputs):
                path, facts = self.windowed(facts, places)  # noqa: PLW2901 - what is run in its place
            if facts.file not in sessions:
                sessions[facts.file] = open_graph(path, 1, SPIN)
            graphs[name] = OrtGraph(sessions[facts.file], facts)
        self.decoder = SlotDecoder(self.device, graphs, manifest, places)
        self.decoder.warm_up()

    def windowed(self, facts: GraphFacts, places: Places) -> tuple[Path, GraphFacts]:
        """Prepare a graph with slots as for TensorRT."""
        parent = self.bundle.folder.parent  # files will be linked, so of a copy
        copied = Path(shutil.copytree(self.bundle.folder, parent / "copied", dirs_exist_ok=True))
        path, target = copied / facts.file, parent / "windowed"
        weights = [file for file in self.bundle.manifest.files if file.endswith(".onnx.data")]
        written = write_prepared(path, prepared(path, places.slots, lengths=False), weights, target)
        return written, facts.model_copy(update={"inputs": (*facts.inputs, WINDOW)})

    def prompts(self, inputs: Sequence[Any]) -> tuple[Batch, Any]:
        manifest = self.bundle.manifest
        encoder = row_encoder(self.bundle)
        rows = [encoder.row(parse(each, manifest.limits), "Find it.") for each in inputs]
        batch = collate(rows, manifest.markers[PAD])
        embedder = Embedder(manifest, encoder, self.engine)
        return batch, embedder.paths.fast_path.vision.encode(batch.visuals)

    def embedder(self) -> Embedder:
        engine = Engine("slots", self.engine.vision, self.decoder, self.engine.gate)
        return Embedder(self.bundle.manifest, row_encoder(self.bundle), engine)


GPU_LIKE = Places(rows=8, slots=3 * BUCKET, padded=True, chunk=4)
WINDOWED = replace(GPU_LIKE, windows=(BUCKET // 2, BUCKET, 3 * BUCKET))


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Embedder:
    return torch_embedder(load_checkpoint(tiny_checkpoint))


@pytest.fixture(scope="module", params=["portable", "padded", "windowed", "fused"])
def setting(request: pytest.FixtureRequest, tiny_bundle: Path, fused_bundle: Path) -> Setting:
    bundle = Bundle.open(fused_bundle if request.param == "fused" else tiny_bundle)
    return Setting(bundle, {"padded": GPU_LIKE, "windowed": WINDOWED}.get(request.param))


@pytest.fixture
def padded(tiny_bundle: Path) -> Setting:
    return Setting(Bundle.open(tiny_bundle), GPU_LIKE)


def decoder_of(embedder: Embedder) -> Decoder[Any]:
    return embedder.paths.fast_path._decoder  # pyright: ignore[reportPrivateUsage]


def close(ours: Any, theirs: Any) -> bool:
    return bool(np.allclose(ours, theirs, atol=2e-5))


def tokens(*rows: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad rows on the right; return token ids and lengths."""
    lengths_B = np.array([len(row) for row in rows], np.int64)
    ids_BT = np.zeros((len(rows), lengths_B.max()), np.int64)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row)] = row
    return ids_BT, lengths_B


def test_a_prefill_gives_the_same_embeddings_and_states(
    setting: Setting, reference: Embedder, mixed_inputs: list[Any]
) -> None:
    batch, visual = setting.prompts(mixed_inputs)
    theirs = decoder_of(reference).prefill(batch, visual)
    for keep in (True, False):
        ours = setting.decoder.prefill(batch, visual, keep=keep)
        assert close(ours.embeddings_BD, theirs.embeddings_BD)
        assert close(ours.states_BD, theirs.states_BD)
        assert ours.cache is None or len(ours.cache) == len(mixed_inputs)


def test_steps_over_rows_that_join_and_leave_give_the_same_logits(
    setting: Setting, reference: Embedder, mixed_inputs: list[Any]
) -> None:
    halves = [setting.prompts(mixed_inputs[:4]), setting.prompts(mixed_inputs[4:])]
    ours: list[Any] = [setting.decoder.prefill(*half).cache for half in halves]
    theirs: list[Any] = [decoder_of(reference).prefill(*half).cache for half in halves]
    with (
        setting.decoder.stack([ours[0].take([3, 1, 2]), ours[1]], 9) as first,
        decoder_of(reference).stack([theirs[0].take([3, 1, 2]), theirs[1]], 9) as second,
    ):
        pair: tuple[Any, Any] = first, second
        for step in range(6):
            if step == 3:
                pair = pair[0].take([0, 2, 3, 5]), pair[1].take([0, 2, 3, 5])
            ids_BT, lengths_B = tokens(*([7 * step + row + 5] for row in range(len(pair[0]))))
            embedded = [2, 0]
            extended = setting.decoder.extend(pair[0], ids_BT, lengths_B, embedded)
            expected = decoder_of(reference).extend(pair[1], ids_BT, lengths_B, embedded)
            assert close(extended.logits(), expected.logits())
            assert close(extended.embeddings, expected.embeddings)
            assert np.array_equal(extended.next_token_B, expected.next_token_B)
            pair = extended.cache, expected.cache


def test_rationales_of_several_lengths_give_the_same_embeddings(
    setting: Setting, reference: Embedder, mixed_inputs: list[Any]
) -> None:
    """Those above the chunk of an engine are fed in several."""
    prompt = setting.prompts(mixed_inputs[:3])
    ids_BT, lengths_B = tokens([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [11], [21, 22, 23, 24])
    found: list[list[Any]] = []
    for decoder in (setting.decoder, decoder_of(reference)):
        cache: Any = decoder.prefill(*prompt).cache
        with decoder.stack([cache], 11) as stacked:
            longer = decoder.extend(stacked, ids_BT, lengths_B, range(3))
            found.append([longer.embeddings, longer.next_token_B, longer.logits().copy()])
            after = decoder.extend(longer.cache, *tokens([31], [32], [33]), range(3))  # after padding between tokens
            found[-1] += [after.embeddings, after.logits()]
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs)


def test_a_stack_leaves_its_caches_as_they_were(setting: Setting, mixed_inputs: list[Any]) -> None:
    cache: Any = setting.decoder.prefill(*setting.prompts(mixed_inputs[:2])).cache
    found = []
    for _ in range(2):
        with setting.decoder.stack([cache], 4) as stacked:
            first = setting.decoder.extend(stacked, *tokens([5], [6]), [0])
            found.append(setting.decoder.extend(first.cache, *tokens([7], [8]), [0, 1]).embeddings)
    assert np.array_equal(found[0], found[1])


def test_rows_that_wait_are_not_changed_by_the_steps_of_others(padded: Setting, mixed_inputs: list[Any]) -> None:
    def reasoned(cache: Any) -> Any:
        with padded.decoder.stack([cache], 3) as stacked:
            step = padded.decoder.extend(stacked, *tokens([5]), [])
            return padded.decoder.extend(step.cache, *tokens([6]), [0]).embeddings[0]

    cache: Any = padded.decoder.prefill(*padded.prompts(mixed_inputs[:3])).cache
    before = [reasoned(cache.take([row])) for row in range(3)]
    after = [reasoned(cache.take([row])) for row in reversed(range(3))][::-1]
    assert np.allclose(before, after, atol=1e-6)  # who waits beside a row is another


def test_rows_beyond_the_pool_are_copied_out_and_go_on_as_if_they_were_not(
    padded: Setting, reference: Embedder, mixed_inputs: list[Any]
) -> None:
    held, expected = [], []
    for _ in range(3):  # 15 rows in a pool of 8
        prompt = padded.prompts(mixed_inputs[:5])
        held.append(padded.decoder.prefill(*prompt).cache)
        expected.append(decoder_of(reference).prefill(*prompt).cache)
    for ours, theirs in zip(held, expected, strict=True):
        found = []
        for decoder, cache in ((padded.decoder, ours), (decoder_of(reference), theirs)):
            with decoder.stack([cache], 2) as stacked:  # type: ignore[list-item]
                found.append(decoder.extend(stacked, *tokens([5], [6], [7], [8], [9]), range(5)).embeddings)
        assert close(*found)
    with pytest.raises(BackendError, match="15 rows are above the 8 of the KV cache"):
        padded.decoder.pool.lease(15)


def test_a_step_moves_ids_alone_and_asks_for_nothing(padded: Setting, mixed_inputs: list[Any]) -> None:
    model = padded.bundle.manifest.model
    cache: Any = padded.decoder.prefill(*padded.prompts(mixed_inputs[:4])).cache
    counts = padded.device.counts
    with padded.decoder.stack([cache], 8) as stacked:
        counts.clear()
        step = padded.decoder.extend(stacked, *tokens([5], [6], [7], [8]), [])
        joined = counts.copy()
        counts.clear()
        for _ in range(3):
            ids_B1 = step.next_token_B[:, None]
            step = padded.decoder.extend(step.cache, ids_B1, np.ones(4, np.int64), [])
        assert counts == {"inside": 3 * 4 * (8 + 24 + 8), "copies": 9, "down": 3 * 4 * 8, "waits": 3}
        assert joined["up"] == 4 * ALIGNMENT  # ids, positions, starts and lasts, once, each where a tensor may begin
        counts.clear()
        left = step.cache.take([0, 1, 3])
        for _ in range(2):
            step = padded.decoder.extend(left, step.next_token_B[:3, None], np.ones(3, np.int64), [1])
        assert "recorded" not in counts
        assert "allocated" not in counts
        assert counts["down"] == 2 * (4 * 8 + 4 * model.hidden_size)


def test_a_step_that_cannot_be_recorded_once_inputs_come_is_warned_of(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ONNX Runtime on a GPU, whose pool grows: nothing is recorded, and noted, when it is loaded."""

    def refused(*_: Any) -> None:
        raise RecordError("an operation is not permitted")

    setting = Setting(Bundle.open(tiny_bundle), Places(padded=True))
    monkeypatch.setattr(setting.device, "record", refused)
    found = setting.embedder().encode(["one"], reasoning="always")
    assert close(found, Setting(setting.bundle, Places(padded=True)).embedder().encode(["one"], reasoning="always"))
    assert "rows run without a CUDA graph: an operation is not permitted" in caplog.text


class Idle:
    """An engine that computes nothing, so that a model of any size runs."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts

    def takes(self, shapes: Any) -> bool:
        return bool(shapes)

    def bind(self, shapes: Any, addresses: Any, *, again: bool = False) -> Callable[[], None]:
        assert again or shapes.keys() <= addresses.keys()
        return lambda: None


def test_a_step_of_a_2b_model_copies_no_keys_and_brings_8_bytes_a_row_to_the_host(tiny_bundle: Path) -> None:
    tiny, rows, tokens, slots, hidden, words = Bundle.open(tiny_bundle).manifest, 8, 300, 512, 2048, 151936
    sizes = {"hidden_size": hidden, "layers": 28, "kv_heads": 8, "head_dim": 128, "vocabulary_size": words}
    wider: dict[int | str, int] = {tiny.model.hidden_size: hidden, tiny.model.vocabulary_size: words}

    def widened(tensor: TensorFacts) -> TensorFacts:
        return tensor.model_copy(update={"shape": tuple(wider.get(axis, axis) for axis in tensor.shape)})

    facts = tiny.graphs[abi.GENERATOR]
    inputs, outputs = ([widened(tensor) for tensor in tensors] for tensors in (facts.inputs, facts.outputs))
    facts = facts.model_copy(update={"inputs": inputs, "outputs": outputs, "compute": "bfloat16"})
    model = tiny.model.model_copy(update=sizes)
    manifest = tiny.model_copy(update={"model": model, "graphs": {abi.EMBEDDER: facts}})
    graphs: dict[str, Idle] = dict.fromkeys((abi.EMBEDDER, abi.GENERATOR), Idle(facts))
    places = Places(rows=rows, slots=slots, padded=True, chunk=64, windows=windows(slots))
    device = Counting()
    decoder = SlotDecoder(device, graphs, manifest, places)
    decoder.warm_up()
    assert device.counts["allocated"] > rows * slots * manifest.cache_token_bytes == 8 * 512 * 112 * 1024

    ids_BT: NDArray[np.int64] = np.zeros((rows, tokens), np.int64)
    positions_3BT = np.broadcast_to(np.arange(tokens), (3, rows, tokens))
    batch = Batch(ids_BT, positions_3BT, ids_BT + 1, ids_BT, np.full(rows, tokens), (), 0)
    shown = {abi.VISUAL_TOKENS: (1, hidden), abi.DEEPSTACK: (model.deepstack_levels, 1, hidden)}
    cache = decoder.prefill(batch, {name: np.zeros(shape, np.float32) for name, shape in shown.items()}).cache
    assert cache is not None
    with decoder.stack([cache], 5) as stacked:
        step = decoder.extend(stacked, ids_BT[:, :1], np.ones(rows, np.int64), [])
        device.counts.clear()
        for _ in range(4):
            step = decoder.extend(step.cache, step.next_token_B[:, None], np.ones(rows, np.int64), [])
    fed_back = rows * (8 + 24 + 8)  # ids, positions and starts, from a step to the next
    assert device.counts == {"inside": 4 * fed_back, "copies": 12, "down": 4 * 64, "waits": 4}

    with decoder.stack([cache], 5) as stacked:
        device.counts.clear()
        decoder.extend(stacked, ids_BT[:, :5], np.full(rows, 5), range(rows))
    assert device.counts["down"] == rows * (8 + 4 * hidden)  # next tokens and embeddings, and no logits
    assert device.counts["waits"] == 1


def test_prompts_with_a_prefix_that_their_rows_still_hold_begin_after_it(padded: Setting) -> None:
    first, second = padded.prompts(["one", "two"]), padded.prompts(["three", "four"])
    assert first[0].prefix == second[0].prefix > 0
    whole = padded.decoder.prefill(*second).embeddings_BD
    del whole
    padded.decoder.prefill(*first)
    padded.device.counts.clear()
    shorter = padded.decoder.prefill(*second)
    rows, sent = len(second[0].mask_BT), second[0].mask_BT.shape[1] - second[0].prefix
    visual = sum(array.nbytes for array in second[1].values())
    assert padded.device.counts["up"] == rows * (sent * (1 + 3 + 1) + 2) * 8 + visual
    fresh = Setting(padded.bundle, GPU_LIKE).decoder.prefill(*second)
    assert close(shorter.embeddings_BD, fresh.embeddings_BD)


def test_more_tokens_than_a_row_has_slots_for_are_refused(padded: Setting, mixed_inputs: list[Any]) -> None:
    cache: Any = padded.decoder.prefill(*padded.prompts(mixed_inputs[:1])).cache
    with (
        pytest.raises(BackendError, match="tokens do not fit in the 192 slots of a row"),
        padded.decoder.stack([cache], 300),
    ):
        pass


def test_an_embedder_over_slots_gives_the_same_embeddings_and_rationales(
    setting: Setting, reference: Embedder, mixed_inputs: list[Any]
) -> None:
    ours = setting.embedder()
    routes: list[EncodeOptions] = [
        {"reasoning": "always", "batch_size": 3},
        {"rationales": ["so it is"] * len(mixed_inputs), "batch_size": 3},
        {"reasoning": "never"},
        {"reasoning_rate": 0.5, "batch_size": 2},
    ]
    for options in routes:
        found = ours.encode_detailed(mixed_inputs, **options)
        expected = reference.encode_detailed(mixed_inputs, **options)
        assert close(found.embeddings, expected.embeddings)
        assert [each and each.rationale_ids for each in found.details] == [
            each and each.rationale_ids for each in expected.details
        ]


def test_a_row_is_free_once_nobody_holds_it() -> None:
    pool = Pool(HostDevice(), Layout(2, 1, 4), 4, BUCKET, grows=False)
    rows = pool.lease(3)
    assert [row.index for row in rows] == [0, 1, 2]
    del rows[1]
    assert pool.holder(1) is None
    assert [row.index for row in pool.lease(1)] == [1]


def test_a_pool_that_grows_keeps_what_is_in_it() -> None:
    device = HostDevice()
    pool = Pool(device, Layout(2, 1, 8), 2, BUCKET, grows=True)
    (row,) = pool.lease(1)
    row.length = 3
    written = np.arange(3, dtype=np.int64)
    for plane, address in enumerate(pool.addresses(row.index)):
        device.upload(written + plane, address)
    pool.ensure(BUCKET + 1)
    pool.lease(5)
    assert (pool.slots, pool.rows) == (2 * BUCKET, 12)
    for plane, address in enumerate(pool.addresses(row.index)):
        (found,) = device.download([Wanted(address, (3,), np.int64)])
        assert np.array_equal(found, written + plane)


@pytest.fixture
def parted() -> tuple[Counting, list[Row]]:
    """Rows of two planes and heads, of 1, 2 and 3 tokens, that have left their pool."""
    device = Counting()
    pool = Pool(device, Layout(2, 2, 8), 4, BUCKET, grows=True)
    rows = pool.lease(3)
    for row in rows:
        row.length = row.index + 1
        for plane, address in enumerate(pool.addresses(row.index)):
            for head in range(2):
                written = 100 * row.index + 10 * plane + head + np.zeros(row.length, np.int64)
                device.upload(written, address + head * BUCKET * 8)
    pool.part(rows)
    assert all(pool.holder(index) is None for index in range(4))
    return device, rows


def check_holds(pool: Pool, row: Row, device: Counting) -> None:
    """A pool holds a row of those that parted."""
    assert pool.holder(row.index) is row
    for plane, address in enumerate(pool.addresses(row.index)):
        for head in range(2):
            (found,) = device.download([Wanted(address + head * pool.slots * 8, (row.length,), np.int64)])
            assert found.tolist() == [100 * (row.length - 1) + 10 * plane + head] * row.length


@pytest.mark.parametrize(("brought", "copies"), [([1, 2], 1), ([0, 1, 2], 1), ([0, 2], 2), ([2, 1, 0], 3)])
def test_rows_that_part_leave_their_pool_and_another_brings_in_at_once_those_that_lie_side_by_side(
    parted: tuple[Counting, list[Row]], brought: list[int], copies: int
) -> None:
    device, rows = parted
    pool, before = Pool(device, Layout(2, 2, 8), 4, 2 * BUCKET, grows=True), device.counts["copies"]
    pool.bring_in([rows[number] for number in brought])
    assert device.counts["copies"] - before == 2 * copies  # planes
    for number in brought:
        check_holds(pool, rows[number], device)


def test_where_memory_ends_while_rows_are_brought_in_none_has_lost_its_tokens(
    parted: tuple[Counting, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, rows = parted
    pool = Pool(device, Layout(2, 2, 8), 2, BUCKET, grows=True)

    def refuse(_: int) -> HostMemory:
        raise BackendError("no memory is left")

    with monkeypatch.context() as patched:
        patched.setattr(device, "allocate", refuse)
        with pytest.raises(BackendError, match="no memory"):
            pool.bring_in(rows)
    for row in rows[:2]:
        check_holds(pool, row, device)
    pool.bring_in(rows)
    for row in rows:
        check_holds(pool, row, device)


def test_a_pool_that_grows_has_room_for_rows_that_came_one_by_one() -> None:
    pool = Pool(HostDevice(), Layout(2, 1, 8), 8, BUCKET, grows=True)
    rows = [pool.lease(1)[0] for _ in range(20)]
    assert all(row.parked is None for row in rows)
    pool.bring_in(rows)
    pool.gather(rows)
    assert [row.index - rows[0].index for row in rows] == list(range(20))


def test_rows_that_run_come_first_and_only_what_fills_or_frees_a_gap_is_copied() -> None:
    device = Counting()
    pool = Pool(device, Layout(2, 1, 8), 8, BUCKET, grows=True)
    rows = pool.lease(6)
    for number, row in enumerate(rows):
        row.length = 3
        for plane, address in enumerate(pool.addresses(row.index)):
            device.upload(np.arange(3, dtype=np.int64) + 10 * number + plane, address)
    copied = pool.layout.token_bytes * 3
    zero, _, two, three, waits, five = rows
    del rows[1], _
    pool.gather([five, three, two, zero])
    assert (five.index, waits.index, device.counts["inside"]) == (1, 4, copied)
    pool.gather([waits, five])
    assert (waits.index, five.index, device.counts["inside"]) == (0, 1, 3 * copied)
    for number, row in zip((0, 2, 3, 4, 5), rows, strict=True):
        for plane, address in enumerate(pool.addresses(row.index)):
            (found,) = device.download([Wanted(address, (3,), np.int64)])
            assert np.array_equal(found, np.arange(3) + 10 * number + plane)


@pytest.mark.parametrize("places", [Places(), Places(padded=True)], ids=["exact", "padded"])
def test_what_steps_of_a_few_rows_write_to_stays_when_more_rows_come(tiny_bundle: Path, places: Places) -> None:
    setting = Setting(Bundle.open(tiny_bundle), places)
    embedder = setting.embedder()
    for count in (1, 4, 2):
        embedder.encode(["one"] * count, reasoning="always")
    steps = setting.decoder._bound.values()  # pyright: ignore[reportPrivateUsage]
    assert len(steps) > 1
    for name in (abi.EMBEDDING, abi.LOGITS):
        assert len({step.outputs[name].address for step in steps}) == 1


@pytest.mark.parametrize(("slots", "sizes"), [(192, (192,)), (1024, (256, 1024)), (8256, (576, 2112, 8256))])
def test_windows_end_in_all_slots_and_are_few(slots: int, sizes: tuple[int, ...]) -> None:
    assert windows(slots) == sizes


def test_a_step_of_short_rows_is_one_that_looks_at_few_slots(tiny_bundle: Path, mixed_inputs: list[Any]) -> None:
    setting = Setting(Bundle.open(tiny_bundle), WINDOWED)
    assert setting.device.counts["recorded"] == 4 * len(WINDOWED.windows)  # of 1, 2, 4 and 8 rows
    bound: list[int] = []
    bind = SlotDecoder._bind_step  # pyright: ignore[reportPrivateUsage]
    embedder = setting.embedder()

    def noted(self: SlotDecoder, count: int, window: int) -> Any:
        bound.append(window)
        return bind(self, count, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotDecoder, "_bind_step", noted)
        embedder.encode(mixed_inputs, reasoning="always")
        assert bound == []  # every window was bound and recorded at the start
        setting.decoder._bound.clear()  # pyright: ignore[reportPrivateUsage]
        embedder.encode(["one"], reasoning="always")
    assert bound[0] < setting.decoder.pool.slots
    assert bound == sorted(set(bound))  # they grow with the row
