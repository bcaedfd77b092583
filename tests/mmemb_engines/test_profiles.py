"""Profiles hold every shape that the limits allow, and little more."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mmemb_deploy.backends.kv_cache.pool import BUCKET
from mmemb_deploy.backends.kv_cache.slots import windows
from mmemb_deploy.backends.tensorrt.files import ProfileShapes
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.errors import InputError, OptionError
from mmemb_deploy.inputs.preprocess import Resize, VisionSpec, resized_size, resized_video_size
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_engines.profiles import boxes, demand_of_limits, demand_of_traffic, most_patches, profiles, read_traffic


@pytest.fixture
def manifest(bundle: Bundle) -> Manifest:
    return bundle.manifest


@pytest.mark.parametrize(("rows", "length", "area"), [(32, 4096, 32768), (8, 100, 800), (5, 64, 100), (1, 9, 4)])
def test_boxes_hold_every_shape_within_the_area_and_none_is_twice_beyond_it(rows: int, length: int, area: int) -> None:
    found = list(boxes(rows, length, area))
    for height in range(1, rows + 1):
        widest = length if height == 1 else min(length, area // height)
        assert any(height <= most and widest <= reach for most, reach in found)
    assert all(most * reach < 2 * max(area, length) for most, reach in found)


def test_boxes_are_one_where_the_area_bounds_nothing() -> None:
    assert list(boxes(8, 100, 800)) == [(8, 100)]


@pytest.mark.parametrize(("pixels", "patch"), [((1024, 1024), 8), ((65536, 1310720), 16), ((256, 65536), 4)])
@pytest.mark.parametrize("resize", ["transformers", "qwen-vl-utils"])
def test_no_image_or_frame_has_more_patches_than_the_bound(pixels: tuple[int, int], patch: int, resize: Resize) -> None:
    spec = VisionSpec(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=pixels[0],
        max_pixels=pixels[1],
        video_min_pixels=2 * pixels[0],
        video_max_pixels=2 * pixels[1],
        image_mean=(0.5,) * 3,
        image_std=(0.5,) * 3,
        position_side=8,
        head_dim=24,
        rope_theta=1e4,
        resize=resize,
    )
    sides = [1, 2, 7, 30, 31, 100, 199, 333, 640, 1999, 6000]
    sizes = [(high, wide) for high, wide in itertools.product(sides, sides) if max(high, wide) <= 200 * min(high, wide)]
    fitted = [resized_size(*size, spec) for size in sizes]
    fitted += [resized_video_size(frames, *size, spec) for size in sizes for frames in (1, 2, 3, 16)]
    assert max(high * wide // patch**2 for high, wide in fitted) <= most_patches(spec)


def bounds(found: tuple[ProfileShapes, ...], tensor: str) -> list[tuple[tuple[int, ...], ...]]:
    return [profile[tensor] for profile in found]


def test_every_input_of_every_graph_has_a_shape_in_every_profile(manifest: Manifest) -> None:
    demand = demand_of_limits(manifest, 32)
    for name, (graph, *_) in manifest.engines.items():
        for profile in profiles(name, manifest, demand):
            window = {abi.WINDOW} if name == "decoder" else set[str]()
            assert set(profile) == {tensor.name for tensor in manifest.graphs[graph].inputs} | window
            for least, usual, most in profile.values():
                assert all(low <= middle <= high for low, middle, high in zip(least, usual, most, strict=True))


def test_windows_reach_from_few_slots_to_all(manifest: Manifest) -> None:
    demand = demand_of_limits(manifest, 32)
    for profile in profiles("decoder", manifest, demand):
        (least,), (usual,), (most,) = profile[abi.WINDOW]
        assert (least, most) == (windows(demand.slots)[0], demand.slots)
        assert usual >= min(profile[abi.TOKEN_IDS][1][1], most)
        assert usual in windows(demand.slots)


def test_prefill_holds_the_longest_prompt_and_the_largest_batch(manifest: Manifest) -> None:
    demand = demand_of_limits(manifest, 32)
    longest = manifest.batch.row_tokens - manifest.model.max_rationale_tokens - PATH_MARKERS
    most = [most for _, _, most in bounds(profiles(abi.DIRECT, manifest, demand), abi.TOKEN_IDS)]
    assert most[0][0] == 32
    assert (8, longest) in most
    assert most[-1] == (1, longest)  # to be fastest at when it comes alone


def test_steps_have_profiles_of_all_rows_of_one_row_and_of_a_rationale_s_chunk(manifest: Manifest) -> None:
    demand = demand_of_limits(manifest, 4)
    steps = bounds(profiles("decoder", manifest, demand), abi.TOKEN_IDS)[-3:]
    chunk = manifest.model.max_rationale_tokens + PATH_MARKERS
    assert steps == [((1, 1), (8, 1), (8, 1)), ((1, 1), (1, 1), (1, 1)), ((1, 1), (8, chunk), (8, chunk))]


def test_the_slots_hold_a_prompt_its_rationale_and_a_chunk_beyond_in_every_profile(manifest: Manifest) -> None:
    demand = demand_of_limits(manifest, 4)
    found = bounds(profiles("decoder", manifest, demand), next(abi.past_names(1)))
    assert {shape[2] for box in found for shape in box} == {demand.slots}
    assert demand.slots % BUCKET == 0
    assert demand.slots >= manifest.batch.row_tokens + demand.chunk


def test_fewer_tokens_or_bytes_make_a_smaller_cache(manifest: Manifest) -> None:
    whole = demand_of_limits(manifest, 32)
    shorter = demand_of_limits(manifest, 32, tokens=100)
    assert (whole.cache_rows, shorter.cache_rows) == (64, 64)
    assert shorter.slots < whole.slots
    row = whole.slots * manifest.cache_token_bytes
    smaller = demand_of_limits(manifest, 32, cache_bytes=5 * row + 1)
    assert smaller.cache_rows == 5
    prompts = bounds(profiles("decoder", manifest, smaller), abi.TOKEN_IDS)[:-3]
    assert max(most[0] for _, _, most in prompts) == 5
    with pytest.raises(OptionError, match="tokens is 100000: this bundle's prompts have 1 to "):
        demand_of_limits(manifest, 32, tokens=100_000)


@pytest.mark.parametrize("rows", [0, -1])
def test_a_batch_of_no_rows_is_refused(manifest: Manifest, rows: int) -> None:
    with pytest.raises(OptionError, match=f"batch is {rows}: it must be at least 1"):
        demand_of_limits(manifest, rows)


@pytest.fixture
def traffic(bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / "traffic.jsonl"
    path.write_text('"three"\n"three plus four"\n{"text": "a longer text than the other two", "id": "long"}\n')
    assert bundle.folder.is_dir()
    return path


def test_traffic_sets_what_is_usual_and_what_is_most(bundle: Bundle, traffic: Path) -> None:
    sample = read_traffic(bundle, traffic)
    demand = demand_of_traffic(bundle.manifest, 4, sample)
    lengths = sorted(row.length for row in sample)
    assert (demand.opt_tokens, demand.tokens) == (lengths[1], lengths[2])
    batches, alone = bounds(profiles(abi.DIRECT, bundle.manifest, demand), abi.TOKEN_IDS)
    assert batches == ((1, 1), (4, lengths[1]), (4, lengths[2]))
    assert alone == ((1, 1), (1, lengths[1]), (1, lengths[2]))
    assert demand.slots < demand_of_limits(bundle.manifest, 4).slots


def test_traffic_with_images_sets_the_patches(bundle: Bundle, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "image.png")
    path = tmp_path / "traffic.jsonl"
    path.write_text('{"image": "image.png"}\n')
    (row,) = sample = read_traffic(bundle, path)
    demand = demand_of_traffic(bundle.manifest, 4, sample)
    (visual,) = row.visuals
    assert demand.patches == demand.opt_patches == visual.grid[0] * visual.grid[1]
    assert demand.opt_visual_tokens == visual.tokens


def test_traffic_that_cannot_be_read_is_named(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not exist"):
        read_traffic(bundle, tmp_path / "none.jsonl")
    path = tmp_path / "traffic.jsonl"
    path.write_text('"a text"\n{"image": "missing.png"}\n')
    with pytest.raises(InputError, match="input 1: "):
        read_traffic(bundle, path)


def test_an_empty_sample_is_refused(manifest: Manifest) -> None:
    with pytest.raises(OptionError, match="the traffic sample is empty"):
        demand_of_traffic(manifest, 4, [])
