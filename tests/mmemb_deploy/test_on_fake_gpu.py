"""Bundles are built, loaded and run on a GPU that is not there, by the code that runs on one that is.

The GPU is `tests/fake_gpu`: it computes by ONNX Runtime on the CPU, as late as CUDA allows, and fails a test that
breaks a rule of CUDA's or TensorRT's. This shows whether the code around the engines is right; none of it has run on a
GPU.
"""

import gc
import json
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy import Embedder
from mmemb_deploy.backends import nvtx
from mmemb_deploy.backends.cuda import Cuda
from mmemb_deploy.backends.device import ALIGNMENT
from mmemb_deploy.cli.main import application
from mmemb_deploy.errors import BackendError
from mmemb_deploy.options import EncodeOptions

pytestmark = pytest.mark.no_gpu

ROUTES: list[EncodeOptions] = [{"reasoning": "never"}, {"reasoning": "always"}, {"reasoning_rate": 0.5}]
MESSAGE = "an illegal memory access was encountered"  # that TensorRT leaves in its log

PlugIn = Callable[..., AbstractContextManager[Any]]


def build(folder: Path, batch: int, *more: str) -> None:
    application()(["build", str(folder), "--batch", str(batch), *more], standalone_mode=False)


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample that `mixed_inputs` do not exceed, so that the cache is no larger than it must be."""
    folder = tmp_path_factory.mktemp("traffic")
    for side in (24, 32):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(folder / f"{side}.png")
    lines = [{"images": ["32.png"] * 4, "text": "what is it? " * 12}, {"video": ["24.png"] * 8, "fps": 2.0}]
    (folder / "traffic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "traffic.jsonl"


@pytest.fixture(scope="module")
def built(plug_in: PlugIn, tiny_bundle: Path, traffic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bundle` with engines that take four inputs at once. They are verified."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    with plug_in():
        build(folder, 4, "--traffic", str(traffic))
    return folder


@pytest.fixture
def embedder(gpu: Any, built: Path) -> Embedder:
    """The engines, loaded."""
    assert gpu.misuses == []
    return Embedder.load(built, backend="tensorrt")


def close(ours: NDArray[Any], theirs: NDArray[Any]) -> bool:
    return bool(np.allclose(ours, theirs, atol=2e-5))


def sized(options: EncodeOptions, batch_size: int) -> EncodeOptions:
    return {**options, "batch_size": batch_size}


@pytest.mark.parametrize("options", ROUTES)
def test_embeddings_and_rationales_are_those_of_the_cpu(
    options: EncodeOptions, embedder: Embedder, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    ours = embedder.encode_detailed(mixed_inputs, **sized(options, 4))
    theirs = tiny_embedder.encode_detailed(mixed_inputs, **options)
    assert close(ours.embeddings, theirs.embeddings)
    assert [each and each.rationale_ids for each in ours.details] == [
        each and each.rationale_ids for each in theirs.details
    ]


def test_more_inputs_than_the_engines_take_run_in_several_batches(
    embedder: Embedder, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    many = [*mixed_inputs, "seven plus one", "four"]
    for options in ROUTES:
        assert close(embedder.encode(many, **sized(options, 64)), tiny_embedder.encode(many, **options))


def test_a_rationale_may_be_longer_than_the_bundle_writes(
    embedder: Embedder, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    most = tiny_embedder.manifest.model.max_rationale_tokens
    rationales = [[5, 6], list(range(5, 5 + 3 * most)), None, list(range(5, 5 + most))]
    options: EncodeOptions = {"rationales": rationales, "reasoning": "never"}
    assert close(embedder.encode(mixed_inputs[:4], **options), tiny_embedder.encode(mixed_inputs[:4], **options))


@pytest.mark.parametrize("batch", [1, 3])
def test_engines_for_fewer_inputs_than_the_reference_has_are_verified(
    batch: int,
    gpu: Any,
    tiny_bundle: Path,
    traffic: Path,
    tmp_path: Path,
    tiny_embedder: Embedder,
    mixed_inputs: list[Any],
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    build(folder, batch, "--traffic", str(traffic))
    assert close(Embedder.load(folder, backend="tensorrt").encode(mixed_inputs), tiny_embedder.encode(mixed_inputs))
    assert gpu.counts["runs"] > 0


def test_a_check_loads_every_engine_once_and_writes_its_layers_down(
    gpu: Any, built: Path, traffic: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "bundle"))
    (listing,) = folder.glob("engines/*/engines.json")
    listing.write_text(json.dumps(json.loads(listing.read_text()) | {"certificate": None}))
    engines = list(listing.parent.glob("*.engine"))
    for engine in engines:
        engine.with_suffix(".json").unlink()
    build(folder, 4, "--traffic", str(traffic))
    assert json.loads(listing.read_text())["certificate"] is not None
    assert gpu.counts["deserialized"] == len(engines)
    assert all(json.loads(engine.with_suffix(".json").read_text())["Layers"] for engine in engines)


def test_without_an_engine_of_its_own_what_nothing_follows_runs_in_the_decoder_s(
    gpu: Any, built: Path, traffic: Path, tmp_path: Path, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    folder, asked = Path(shutil.copytree(built, tmp_path / "bundle")), ("--traffic", str(traffic))
    (listing,) = folder.glob("engines/*/engines.json")
    build(folder, 4, *asked, "--no-direct")
    assert json.loads(listing.read_text())["engines"].keys() == {"vision", "decoder", "gate"}
    assert list(listing.parent.glob("direct-*")) == []
    loaded = Embedder.load(folder, backend="tensorrt")
    for options in ROUTES:
        assert close(loaded.encode(mixed_inputs, **sized(options, 4)), tiny_embedder.encode(mixed_inputs, **options))
    assert "runs_direct" not in gpu.counts
    build(folder, 4, *asked)
    Embedder.load(folder, backend="tensorrt").encode(mixed_inputs[:1], reasoning="never")
    assert gpu.counts["runs_direct"] > 0


def test_engines_fitted_to_texts_alone_are_verified_and_say_what_they_do_not_take(
    gpu: Any, tiny_bundle: Path, tmp_path: Path, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    texts = [each for each in mixed_inputs if isinstance(each, str)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    build(folder, 8, "--traffic", str(tmp_path / "texts.jsonl"))
    fitted = Embedder.load(folder, backend="tensorrt")
    assert close(fitted.encode(texts), tiny_embedder.encode(texts))
    with pytest.raises(BackendError, match=r"at most .*`mmemb build"):
        fitted.encode([mixed_inputs[1]])
    assert gpu.counts["runs"] > 0


def test_bfloat16_with_weights_in_int8_computes_what_the_checkpoint_does(
    gpu: Any, uneven_checkpoint: Path, tmp_path: Path, mixed_inputs: list[Any]
) -> None:
    from mmemb_export.recipe import Recipe
    from mmemb_export.write import export_bundle

    folder = tmp_path / "bundle"
    recipe = Recipe(precision="bfloat16", generator_precision="int8", min_cosine=0.5, min_token_agreement=0)
    export_bundle(uneven_checkpoint, folder, recipe=recipe, probes=4, report=lambda _: None)
    build(folder, 32)
    (listing,) = folder.glob("engines/*/engines.json")
    certificate = json.loads(listing.read_text())["certificate"]
    assert all(each["min_cosine"] > 0.999 for each in certificate["modalities"].values())
    assert certificate["reasoned"]["min_cosine"] > 0.98
    found = Embedder.load(folder, backend="tensorrt").encode(mixed_inputs, reasoning="always")
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    assert gpu.counts["launches"] > 1


def test_an_embedder_may_be_used_by_several_threads(
    embedder: Embedder, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    begin = threading.Barrier(8)

    def run(thread: int) -> NDArray[Any]:
        begin.wait()
        chosen = [mixed_inputs[thread % len(mixed_inputs)], mixed_inputs[(thread + 3) % len(mixed_inputs)]]
        return np.concatenate([embedder.encode(chosen, **ROUTES[turn % 2]) for turn in range(2)])

    with ThreadPoolExecutor(8) as pool:
        ours = list(pool.map(run, range(8)))
    for thread, found in enumerate(ours):
        chosen = [mixed_inputs[thread % len(mixed_inputs)], mixed_inputs[(thread + 3) % len(mixed_inputs)]]
        expected = [tiny_embedder.encode(chosen, **ROUTES[turn % 2]) for turn in range(2)]
        assert close(found, np.concatenate(expected))


def test_where_nothing_can_be_recorded_everything_runs_plainly(
    gpu: Any, built: Path, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    gpu.fail("capture", times=1000)
    loaded = Embedder.load(built, backend="tensorrt")
    assert any("run without a CUDA graph" in note for note in loaded.notes)
    expected = tiny_embedder.encode(mixed_inputs[:4], reasoning="always")
    assert close(loaded.encode(mixed_inputs[:4], reasoning="always"), expected)
    assert gpu.counts["captures"] > 0
    assert gpu.counts["launches"] == 0


def test_a_run_that_fails_is_an_error_that_says_why_and_the_next_one_runs(
    gpu: Any, embedder: Embedder, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    expected = tiny_embedder.encode(mixed_inputs[:4], reasoning="always")
    assert close(embedder.encode(mixed_inputs[:4], reasoning="always"), expected)
    before = gpu.counts["enqueues"]
    assert close(embedder.encode(mixed_inputs[:4], reasoning="always"), expected)
    for after in range(gpu.counts["enqueues"] - before):
        gpu.fail("enqueue", after=after)
        with pytest.raises(BackendError, match=MESSAGE):
            embedder.encode(mixed_inputs[:4], reasoning="always")
    assert close(embedder.encode(mixed_inputs[:4], reasoning="always"), expected)


def test_memory_that_runs_out_is_an_error_and_the_next_call_runs(
    gpu: Any, embedder: Embedder, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    gpu.fail("memory")
    with pytest.raises(BackendError, match="out of memory"):
        embedder.encode(mixed_inputs[:4], reasoning="always")
    assert close(
        embedder.encode(mixed_inputs[:4], reasoning="always"),
        tiny_embedder.encode(mixed_inputs[:4], reasoning="always"),
    )


@pytest.mark.parametrize("what", ["deserialize", "context"])
def test_an_engine_that_does_not_fit_is_an_error_that_says_why(
    what: str, gpu: Any, built: Path, mixed_inputs: list[Any]
) -> None:
    gpu.fail(what)
    with pytest.raises(BackendError, match="out of memory"):
        Embedder.load(built, backend="tensorrt").encode(mixed_inputs[:1])
    Embedder.load(built, backend="tensorrt").encode(mixed_inputs[:1])


@pytest.mark.parametrize("asked", ["0", "1"])
def test_layers_are_marked_only_where_nvtx_is_asked_for(
    asked: str, gpu: Any, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nvtx.VARIABLE, asked)
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=lambda *_, **__: nullcontext()))
    nvtx.library.cache_clear()
    try:
        Embedder.load(built, backend="tensorrt").encode(["one"], reasoning="always")
    finally:
        nvtx.library.cache_clear()
    assert gpu.counts["marked_enqueues"] == int(asked) * gpu.counts["enqueues"]


def test_an_embedder_that_goes_gives_back_all_memory(gpu: Any, built: Path, mixed_inputs: list[Any]) -> None:
    embedder = Embedder.load(built, backend="tensorrt")
    embedder.encode(mixed_inputs[:4], reasoning="always")
    assert gpu.memory.used > 0
    del embedder
    gc.collect()
    assert gpu.memory.used == 0


def test_calls_that_repeat_take_no_more_memory(gpu: Any, embedder: Embedder, mixed_inputs: list[Any]) -> None:
    def used() -> int:
        embedder.encode(mixed_inputs[:3], reasoning="always")
        return int(gpu.memory.used)

    first = used()
    assert [used() for _ in range(5)] == [first] * 5


def test_a_decode_step_moves_a_few_bytes_a_row_and_makes_nothing_anew(
    gpu: Any, embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    """An interval ends where the host waits; the rows of a call leave one after the other."""
    texts = [each for each in mixed_inputs if isinstance(each, str)]
    model, begin = embedder.manifest.model, 0
    for _ in range(2):  # the first call records
        begin = len(gpu.intervals)
        embedder.encode(texts, reasoning="always")
    called, steps = gpu.intervals[begin:], [each for each in gpu.intervals[begin:] if each["launches"]]
    assert len(steps) > 1
    assert sum(each["captures"] + each["instantiations"] for each in called) == 0
    down = [step["d2h_pinned_bytes"] + step["d2h_pageable_bytes"] for step in steps]
    assert min(down) <= 64 * len(texts)
    assert sum(down) <= (64 * len(steps) + 4 * model.hidden_size) * len(texts)  # every row brings its embedding, once
    for step in steps:
        made = {"allocations", "frees", "memsets", "host_allocations", "enqueues", "h2d_pageable_copies"}
        assert {name: step[name] for name in made if step[name]} == {}
        assert step["launches"] == 1
        assert step["d2d_copies"] == 3  # what the step feeds to the next: ids, positions, starts
        assert step["d2d_bytes"] <= 64 * len(texts)
        assert step["h2d_pinned_bytes"] in (0, 4 * ALIGNMENT)  # nothing, or all that a step reads of its rows
        assert step["cache_bytes"] <= 2 * model.layers * model.kv_heads * model.head_dim * 4 * len(texts)


def test_all_of_an_embedder_is_on_the_gpu_of_its_index_in_every_thread(
    plug_in: PlugIn, built: Path, traffic: Path, tmp_path: Path, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "bundle"))
    (listing,) = folder.glob("engines/*/engines.json")
    listing.write_text(json.dumps(json.loads(listing.read_text()) | {"certificate": None}))

    def run(embedder: Embedder, turn: int) -> NDArray[Any]:
        return embedder.encode(mixed_inputs[:4], **ROUTES[turn % 3])

    with plug_in(devices=2) as gpus:
        build(folder, 4, "--traffic", str(traffic), "--device", "1")
        embedder = Embedder.load(folder, backend="tensorrt", device=1)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(partial(run, embedder), range(6)))
        assert all(close(each, run(tiny_embedder, turn)) for turn, each in enumerate(found))
        assert [memory.taken > 0 for memory in gpus.memories] == [False, True]
        assert {each.device for handle, each in (*gpus.streams.items(), *gpus.events.items()) if handle > 0} == {1}
        del embedder
        gc.collect()
        assert gpus.memories[1].used == 0


def test_a_thread_that_does_not_set_its_device_is_refused(
    plug_in: PlugIn, built: Path, tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plug_in(devices=2), ThreadPoolExecutor(1) as pool:
        embedder = Embedder.load(built, backend="tensorrt", device=1)
        monkeypatch.setattr(Cuda, "lock", property(lambda cuda: cuda._lock))
        with pytest.raises(BackendError, match="invalid resource handle"):
            pool.submit(embedder.encode, ["one"]).result()
        assert close(embedder.encode(["one"]), tiny_embedder.encode(["one"]))


def test_embedders_of_two_gpus_take_turns_in_one_thread(
    plug_in: PlugIn, built: Path, tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    with plug_in(devices=2) as gpus:
        embedders = [Embedder.load(built, backend="tensorrt", device=device) for device in (0, 1)]
        for options in ROUTES:
            for embedder in embedders:
                assert close(embedder.encode(mixed_inputs, **options), tiny_embedder.encode(mixed_inputs, **options))
        first, second = (memory.used for memory in gpus.memories)
        assert first == second > 0
