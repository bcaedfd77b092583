"""Preprocessing equals transformers' Qwen3-VL, which is the reference for every array it makes, or qwen-vl-utils."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLModel, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import (
    VisionSpec,
    Visual,
    patch_times,
    pixel_segments,
    resize_image,
    resize_video,
    resized_size,
    resized_video_size,
    rotary_positions,
    vision_tables,
)
from mmemb_training.model import patches

FACTS: dict[str, Any] = {
    "temporal_patch_size": 2,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "head_dim": 16,
    "rope_theta": 10_000.0,
}
QWEN = VisionSpec(
    **FACTS,
    patch_size=16,
    merge_size=2,
    position_side=48,
    min_pixels=64 * 32 * 32,
    max_pixels=256 * 32 * 32,
    video_min_pixels=128 * 32 * 32,
    video_max_pixels=768 * 32 * 32,
)
NANO = VisionSpec(
    **FACTS,
    patch_size=8,
    merge_size=2,
    position_side=4,
    min_pixels=1024,
    max_pixels=1024,
    video_min_pixels=1024,
    video_max_pixels=8192,
)
SCRIPT = replace(  # the bounds of Qwen3-VL-Embedding's inference script
    QWEN,
    resize="qwen-vl-utils",
    min_pixels=4 * 32 * 32,
    max_pixels=1800 * 32 * 32,
    video_min_pixels=128 * 32 * 32,
    video_max_pixels=7680 * 32 * 32,
)
# methods that use no `self`, of classes that need torchvision to be made
calculate_timestamps = vars(Qwen3VLProcessor)["_calculate_timestamps"]
patchify = vars(Qwen3VLVideoProcessor)["patchify"]
SPECS = pytest.mark.parametrize("spec", [QWEN, NANO], ids=["qwen", "nano"])


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def random_sizes(count: int, largest: int = 700) -> list[tuple[int, int]]:
    draw = random.Random(7)
    sizes = [(round(largest ** draw.random()), round(largest ** draw.random())) for _ in range(count)]
    return [(width, height) for width, height in sizes if max(width, height) <= 200 * min(width, height)]


def patches_of(visuals: Sequence[Visual], spec: VisionSpec) -> NDArray[Any]:
    """Return the patches that the vision tower reads of visuals of one shape, in transformers' order, (N * P, F)."""
    pixels_NTPrc = np.require(pixel_segments(visuals, spec), requirements=["W"])  # for torch
    index_Pr = vision_tables(*visuals[0].grid, spec).segment_index_Pr
    patches_NPF = patches(torch.from_numpy(pixels_NTPrc), torch.from_numpy(index_Pr), spec)
    blocks_NPTrcC = patches_NPF.unflatten(-1, (spec.temporal_patch_size, spec.patch_size, spec.patch_size, 3))
    found: NDArray[Any] = blocks_NPTrcC.permute(0, 1, 5, 2, 3, 4).flatten(2).flatten(0, 1).numpy()
    return found


def assert_equal_to_transformers(item: object, reference: Image.Image, spec: VisionSpec) -> None:
    """Compare our patches of an input with transformers' patches of the same picture."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=spec.patch_size,
        merge_size=spec.merge_size,
        temporal_patch_size=spec.temporal_patch_size,
        size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
    )
    expected = processor(images=[reference], return_tensors="np")
    (image,) = parse(item, Limits()).images
    visual = resize_image(image, spec)
    assert [1, *visual.grid] == expected["image_grid_thw"][0].tolist()
    assert visual.tokens == visual.grid[0] * visual.grid[1] // spec.merge_size**2
    actual = patches_of([visual], spec)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected["pixel_values"])


@SPECS
def test_patches_equal_transformers_on_images_of_any_size(spec: VisionSpec) -> None:
    for seed, (width, height) in enumerate(random_sizes(32)):
        image = noise(width, height, seed=seed)
        assert_equal_to_transformers(image, image, spec)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_patches_equal_transformers_in_every_mode(mode: str) -> None:
    image = noise(50, 70, 4).convert(mode)
    assert_equal_to_transformers(image, image, NANO)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_patches_equal_transformers_where_a_palette_is_transparent(transparency: int | bytes) -> None:
    buffer = io.BytesIO()
    noise(50, 70).convert("P").save(buffer, "PNG", transparency=transparency)
    image = Image.open(buffer)
    assert image.mode == "P"
    assert_equal_to_transformers({"image": buffer.getvalue()}, image, NANO)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_patches_equal_transformers_on_the_upright_picture(orientation: int) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    noise(50, 70).save(buffer, "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(buffer))
    assert upright.size == ((50, 70) if orientation < 5 else (70, 50))
    assert_equal_to_transformers({"image": buffer.getvalue()}, upright, QWEN)


@pytest.mark.parametrize("size", [(201, 1), (1, 201)])
def test_an_image_too_narrow_to_embed_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]} pixels has an aspect ratio above 200; crop or tile"):
        resize_image(Image.new("RGB", size), QWEN)
    with pytest.raises(InputError, match="aspect ratio above 200"):
        resize_video([Image.new("RGB", size)] * 2, QWEN)
    assert resize_image(Image.new("RGB", (200, 1)), QWEN).tokens > 0


@SPECS
def test_video_sizes_equal_transformers(spec: VisionSpec) -> None:
    draw = random.Random(3)
    for width, height in random_sizes(400, largest=3000):
        frames = draw.randint(2, 12)
        expected = smart_resize(
            frames,
            height,
            width,
            temporal_factor=spec.temporal_patch_size,
            factor=spec.factor,
            min_pixels=spec.video_min_pixels,
            max_pixels=spec.video_max_pixels,
        )
        assert resized_video_size(frames, height, width, spec) == expected, (frames, height, width)


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_video_patches_follow_the_order_of_transformers(frames: int) -> None:
    clip = [noise(64, 48, seed=seed) for seed in range(frames)]
    visuals = resize_video(clip, NANO)
    height, width = visuals[0].pixels_THWC.shape[1:3]
    video = torch.from_numpy(
        np.stack([np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in clip])
    ).permute(0, 3, 1, 2)
    mean, std = torch.tensor(NANO.image_mean)[:, None, None], torch.tensor(NANO.image_std)[:, None, None]
    expected, *grid = patchify(None, ((video / 255 - mean) / std)[None], 8, 2, 2)
    assert [len(visuals), *visuals[0].grid] == grid
    assert len({visual.grid for visual in visuals}) == 1
    actual = patches_of(visuals, NANO)
    np.testing.assert_allclose(actual, expected[0].numpy(), rtol=0, atol=1e-6)


def test_a_single_frame_fills_its_temporal_patch() -> None:
    frame = noise(64, 48)
    (visual,) = resize_video([frame], NANO)
    (twice,) = resize_video([frame, frame], NANO)
    np.testing.assert_array_equal(patches_of([visual], NANO), patches_of([twice], NANO))


def test_one_image_stands_for_every_frame_of_its_temporal_patch() -> None:
    spec = replace(NANO, temporal_patch_size=3)
    picture = resize_image(noise(64, 48), spec)
    clip = replace(picture, pixels_THWC=np.repeat(picture.pixels_THWC, 3, axis=0))
    np.testing.assert_array_equal(patches_of([picture], spec), patches_of([clip], spec))


def test_patches_of_every_value_equal_transformers() -> None:
    """A float32 quotient by 255 is the rounded float64 product that transformers takes, for all 256 of them."""
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    alike = Visual(pixels, grid=(2, 2), tokens=1)
    mean, std = np.array(NANO.image_mean, np.float32), np.array(NANO.image_std, np.float32)
    expected = ((pixels * np.float64(1 / 255)).astype(np.float32) - mean) / std
    actual = patches_of([alike], NANO).reshape(2, 2, 3, 2, 8, 8)  # patch row and column, C, T, row, column
    np.testing.assert_array_equal(actual[:, :, :, 0].transpose(0, 3, 1, 4, 2).reshape(16, 16, 3), expected[0])


def test_one_image_is_not_copied() -> None:
    picture = resize_image(noise(64, 48), NANO)
    assert np.shares_memory(pixel_segments([picture], NANO), picture.pixels_THWC)


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_times_of_temporal_patches_equal_transformers(frames: int) -> None:
    indices = sorted(random.Random(frames).sample(range(100), frames))
    expected = calculate_timestamps(None, list(indices), 24.0, 2)
    assert patch_times([index / 24.0 for index in indices], 100.0, QWEN) == expected


# (height, width) before, and what qwen-vl-utils 0.0.14 made of it with the script's bounds


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((12, 1500), (32, 1504)),
        ((1500, 12), (1504, 32)),
        ((1, 200), (32, 192)),
        ((15, 64), (32, 160)),
        ((47, 9000), (32, 8992)),
        ((33, 31), (96, 64)),
        ((3, 3), (64, 64)),
        ((80, 48), (64, 64)),
        ((427, 640), (416, 640)),
        ((2000, 3000), (1088, 1632)),
    ],
)
def test_image_sizes_equal_qwen_vl_utils(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert resized_size(*size, SCRIPT) == resized


@pytest.mark.parametrize(
    ("frames", "size", "resized"),
    [
        (1, (240, 320), (352, 416)),
        (3, (221, 333), (288, 480)),
        (3, (33, 31), (448, 320)),
        (2, (8, 8), (384, 384)),
        (4, (20, 1500), (96, 1760)),
        (5, (720, 1280), (640, 1184)),
        (20, (1080, 1920), (640, 1152)),
        (21, (1080, 1920), (608, 1120)),  # shared out as 22 frames' are
        (22, (1080, 1920), (608, 1120)),
        (64, (48, 64), (320, 448)),
        (64, (720, 1280), (352, 640)),
        (130, (720, 1280), (256, 480)),  # 1.05 times the fewest pixels
    ],
)
def test_frame_sizes_equal_qwen_vl_utils(frames: int, size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert resized_video_size(frames, *size, SCRIPT) == resized


def test_frames_are_resized_alone_by_pillow_and_together_as_torchvision_does() -> None:
    clip = [noise(320, 240, seed=seed) for seed in range(3)]
    alone = np.stack([np.asarray(frame.resize((320, 256))) for frame in [*clip, clip[-1]]])
    together = F.interpolate(
        torch.from_numpy(alone).permute(0, 3, 1, 2).float(), (352, 416), mode="bicubic", antialias=True
    )
    expected = together.clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    actual = np.concatenate([visual.pixels_THWC for visual in resize_video(clip, SCRIPT)])
    difference = np.abs(actual - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("fps", [None, 1.0, 3.0, 10.0, 29.97])
def test_times_go_on_where_qwen_vl_utils_repeats_a_frame(frames: int, fps: float | None) -> None:
    request = parse({"video": [noise(8, 8)] * frames} | ({"fps": fps} if fps else {}), Limits())
    expected = calculate_timestamps(None, list(range(frames + frames % 2)), fps or 2.0, 2)
    assert patch_times(request.timestamps, request.next_timestamp, SCRIPT) == expected


def test_a_spec_that_names_no_library_means_transformers() -> None:
    facts = asdict(NANO)
    assert facts.pop("resize") == "transformers"
    reader = TypeAdapter(VisionSpec)
    assert reader.validate_python(facts) == NANO
    with pytest.raises(ValidationError, match="'transformers' or 'qwen-vl-utils'"):
        reader.validate_python(facts | {"resize": "qwen_vl_utils"})


@SPECS
def test_position_tables_equal_transformers(spec: VisionSpec) -> None:
    config = Qwen3VLVisionConfig(hidden_size=2 * spec.head_dim, num_heads=2)
    rotary = Qwen3VLVisionRotaryEmbedding(config)
    for grid in [(2, 2), (2, 8), (8, 2), (4, 6), (32, 18), (48, 48), (50, 2)]:
        thw = torch.tensor([[1, *grid]])
        tables = vision_tables(*grid, spec)
        index, weight = get_vision_interpolation_indices_and_weights(
            thw, spec.position_side, mode="bilinear", align_corners=True, spatial_merge_size=spec.merge_size
        )
        np.testing.assert_array_equal(tables.interpolation_index_P4, index.numpy())
        np.testing.assert_array_equal(tables.interpolation_weight_P4, weight.numpy())
        cos, sin = rotary(torch.zeros(1), get_vision_position_ids(thw, spec.merge_size))
        np.testing.assert_allclose(tables.rotary_cos_PD, cos.numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(tables.rotary_sin_PD, sin.numpy(), rtol=0, atol=1e-6)
        assert {table.dtype.name for table in vars(tables).values()} == {"int64", "float32"}


IMAGE_PAD, VIDEO_PAD = 61, 62


@pytest.fixture(scope="module")
def model() -> Qwen3VLModel:
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=59,
        vision_end_token_id=60,
    )
    return Qwen3VLModel(config)


def visual(grid: tuple[int, int]) -> Visual:
    return Visual(np.zeros((1, 1, 1, 3), np.uint8), grid, grid[0] * grid[1] // 4)


@pytest.mark.parametrize(
    ("images", "video"),
    [
        ([], None),
        ([(4, 6)], None),
        ([(2, 2), (16, 4), (6, 20), (2, 2)], None),
        ([], (3, 4, 8)),
        ([(8, 2), (4, 4)], (2, 6, 4)),
    ],
)
def test_rotary_positions_equal_transformers(
    images: list[tuple[int, int]], video: tuple[int, int, int] | None, model: Any
) -> None:
    visuals = [visual(grid) for grid in images]
    ids = [1, 2, 3]
    for image in visuals:
        ids += [59, *[IMAGE_PAD] * image.tokens, 60]
    for place in range(video[0] if video else 0):
        visuals.append(visual(video[1:] if video else (0, 0)))
        ids += [*range(4, 7 + place), 59, *[VIDEO_PAD] * visuals[-1].tokens, 60]
    ids += [8, 9]
    expected, _ = model.get_rope_index(
        torch.tensor([ids]),
        torch.tensor([[1 if token == IMAGE_PAD else 2 if token == VIDEO_PAD else 0 for token in ids]]),
        image_grid_thw=torch.tensor([[1, *grid] for grid in images]) if images else None,
        video_grid_thw=torch.tensor([video]) if video else None,
    )
    actual = rotary_positions(ids, visuals, (IMAGE_PAD, VIDEO_PAD), 2)
    assert actual.dtype == np.int64
    np.testing.assert_array_equal(actual, expected[:, 0].numpy())
