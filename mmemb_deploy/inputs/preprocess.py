"""Pixels and token ids to the arrays a Qwen3-VL reads, in numpy and Pillow, equal to transformers' processor.

Follows transformers 5.23: `Qwen2VLImageProcessorPil`, `Qwen3VLVideoProcessor`, `vision_utils` and
`Qwen3VLModel.get_rope_index`. Video frames are resized by Pillow, as images are, where transformers uses torchvision.
Where a spec names qwen-vl-utils, images and frames are resized, and frames timed, as its release 0.0.14 does it.
Axes: T frames of one temporal patch, H height, W width, C channels (RGB), N images of one shape, P patches, r rows of a
patch, S tokens of a prompt, A the three rotary axes (time, height, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy.bundle import abi
from mmemb_deploy.errors import InputError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

Resize = Literal["transformers", "qwen-vl-utils"]

MAX_ASPECT_RATIO = 200
# Constants of qwen-vl-utils. It resizes a frame twice: alone, as an image whose tokens have twice their side, and then
# like all frames of its video.
LONE_FRAME_TOKENS = 4, 16384  # fewest and most, of that size
FRAME_MAX_TOKENS = 768
FRAME_MARGIN = 1.05  # a frame's most pixels are at least its fewest times this


@dataclass(frozen=True)
class VisionSpec:
    """What preprocessing must know of a vision tower. Pixels are counted after resizing, lengths in pixels.

    `resize` names the library whose rules hold. The bounds of a video count the pixels of all its frames by those of
    transformers; by those of qwen-vl-utils the lower counts one frame's, the upper one frame's of each temporal patch.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    position_side: int  # the learned position table is position_side x position_side
    head_dim: int
    rope_theta: float
    resize: Resize = "transformers"

    @property
    def factor(self) -> int:
        """Side of one visual token, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def frame_max_pixels(self) -> float:
        """Most pixels of a frame, which the frames of the shortest video may have."""
        if self.resize == "qwen-vl-utils":
            return _frame_bounds(1, self)[1]
        return self.video_max_pixels / self.temporal_patch_size


QWEN3_VL = VisionSpec(
    patch_size=16,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=65536,
    max_pixels=16777216,
    video_min_pixels=4096,
    video_max_pixels=25165824,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    position_side=48,
    head_dim=64,
    rope_theta=10_000.0,
)
"""That of the published Qwen3-VL, for what is shown to a model that is no bundle."""


@dataclass(frozen=True)
class Visual:
    """One image, or one temporal patch of a video, resized: `pixels_THWC` uint8 with T = 1 or temporal_patch_size."""

    pixels_THWC: Pixels
    grid: tuple[int, int]  # patches along height and width
    tokens: int  # visual tokens it becomes


@dataclass(frozen=True, eq=False)
class VisionTables:
    """Tables of one grid: where patches lie in an image's memory and in the learned positions, and rotary angles.

    Rows are patches in the order of the merge blocks. `segment_index_Pr` counts the segments of `pixel_segments`. Two
    are equal if they are the same.
    """

    segment_index_Pr: Ints
    interpolation_index_P4: Ints
    interpolation_weight_P4: Floats
    rotary_cos_PD: Floats
    rotary_sin_PD: Floats

    def inputs(self) -> dict[str, NDArray[Any]]:
        """Return them by the names of the ABI, in the order of the vision graph's inputs."""
        return {
            abi.SEGMENT_INDEX: self.segment_index_Pr,
            abi.INTERPOLATION_INDEX: self.interpolation_index_P4,
            abi.INTERPOLATION_WEIGHT: self.interpolation_weight_P4,
            abi.ROTARY_COS: self.rotary_cos_PD,
            abi.ROTARY_SIN: self.rotary_sin_PD,
        }


def resized_size(height: int, width: int, spec: VisionSpec) -> tuple[int, int]:
    """Return the (height, width) an image is resized to: multiples of `spec.factor` within the pixel bounds.

    Raises InputError if a side is zero or the aspect ratio exceeds 200.
    """
    _check_sides(height, width)
    smallest = spec.factor if spec.resize == "qwen-vl-utils" else 0
    return _fit(height, width, spec.factor, (spec.min_pixels, spec.max_pixels), smallest=smallest)


def resized_video_size(
    frames: int, height: int, width: int, spec: VisionSpec, *, file: bool = False
) -> tuple[int, int]:
    """Return the (height, width) every frame of a video is resized to; frames share out the video's pixels.

    A video shorter than a temporal patch counts as one temporal patch, which is what its repeated last frame fills.
    `file` says that qwen-vl-utils would have decoded the frames itself, and so resized them once. Raises InputError as
    `resized_size` does.
    """
    _check_sides(height, width)
    if spec.resize == "qwen-vl-utils":
        if not file:
            height, width = _lone_frame_size(height, width, spec)
        return _fit(height, width, spec.factor, _frame_bounds(frames, spec), smallest=spec.factor)
    if min(height, width) < spec.factor:
        scale = max(spec.factor / height, spec.factor / width)
        height, width = int(height * scale), int(width * scale)
    step, bounds = spec.temporal_patch_size, (spec.video_min_pixels, spec.video_max_pixels)
    return _fit(height, width, spec.factor, bounds, smallest=0, frames=max(frames, step), step=step)


def _lone_frame_size(height: int, width: int, spec: VisionSpec) -> tuple[int, int]:
    factor = 2 * spec.factor
    few, many = LONE_FRAME_TOKENS
    return _fit(height, width, factor, (few * factor**2, many * factor**2), smallest=factor)


def _frame_bounds(frames: int, spec: VisionSpec) -> tuple[float, float]:
    share = spec.video_max_pixels / math.ceil(frames / spec.temporal_patch_size)
    most = max(min(FRAME_MAX_TOKENS * spec.factor**2, share), int(spec.video_min_pixels * FRAME_MARGIN))
    return spec.video_min_pixels, most


def _check_sides(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise InputError(f"an image of {width} x {height} pixels has nothing to embed; pass at least 1 x 1")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
            f"an image of {width} x {height} pixels has an aspect ratio above {MAX_ASPECT_RATIO}; crop or tile it"
        )


def _fit(
    height: int, width: int, factor: int, bounds: tuple[float, float], *, smallest: int, frames: int = 1, step: int = 1
) -> tuple[int, int]:
    # As in `smart_resize`: the rounded frame count decides whether to scale, the true one decides by how much. Where a
    # frame is so thin that qwen-vl-utils would shrink a side to nothing, and fail, one token remains.
    rounded = max(smallest, round(height / factor) * factor), max(smallest, round(width / factor) * factor)
    total = round(frames / step) * step * rounded[0] * rounded[1]
    min_pixels, max_pixels = bounds
    if total > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if total < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


def resize_image(image: Image.Image, spec: VisionSpec) -> Visual:
    """Resize an RGB image (bicubic) to the size its tokens need."""
    height, width = resized_size(image.height, image.width, spec)
    return _visual(_resized(image, height, width)[None], spec)


def resize_video(frames: Sequence[Image.Image], spec: VisionSpec) -> list[Visual]:
    """Resize the RGB frames of one video and group them into temporal patches, the last frame repeated to fill.

    The frames have one size; there is at least one.
    """
    height, width = resized_video_size(len(frames), frames[0].height, frames[0].width, spec)
    if spec.resize == "qwen-vl-utils":
        lone = _lone_frame_size(frames[0].height, frames[0].width, spec)
        pixels = [_resized_in_float(_resized(frame, *lone), height, width) for frame in frames]
    else:
        pixels = [_resized(frame, height, width) for frame in frames]
    return temporal_patches(pixels, spec)


def resize_file_frame(frame: Image.Image, size: tuple[int, int], spec: VisionSpec) -> Pixels:
    """Resize an RGB frame of a video file to the (height, width) that `resized_video_size` gives for its file."""
    if spec.resize == "qwen-vl-utils":
        return _resized_in_float(np.asarray(frame), *size)
    return _resized(frame, *size)


def temporal_patches(pixels: Sequence[Pixels], spec: VisionSpec) -> list[Visual]:
    """Group frames (H, W, C) of the size that the model reads into temporal patches, the last repeated to fill."""
    step = spec.temporal_patch_size
    pixels = [*pixels, *[pixels[-1]] * (-len(pixels) % step)]
    return [_visual(np.stack(pixels[start : start + step]), spec) for start in range(0, len(pixels), step)]


def patch_times(timestamps: Sequence[float], next_timestamp: float, spec: VisionSpec) -> list[float]:
    """Return the time of each temporal patch, in seconds: the mean of its first and last frame's.

    The frame that fills the last patch has the last frame's time, or with qwen-vl-utils the next one's.
    """
    step = spec.temporal_patch_size
    fill = next_timestamp if spec.resize == "qwen-vl-utils" else timestamps[-1]
    times = [*timestamps, *[fill] * (-len(timestamps) % step)]
    return [(times[start] + times[start + step - 1]) / 2 for start in range(0, len(times), step)]


def _resized(image: Image.Image, height: int, width: int) -> Pixels:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)


def _resized_in_float(pixels_HWC: Pixels, height: int, width: int) -> Pixels:
    # As torchvision resizes a tensor: Pillow's bicubic, but without rounding and clipping between its two passes.
    bands = [
        np.asarray(Image.fromarray(band.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
        for band in pixels_HWC.transpose(2, 0, 1)
    ]
    return np.stack(bands, axis=-1).clip(0, 255).round().astype(np.uint8)


def _visual(pixels_THWC: Pixels, spec: VisionSpec) -> Visual:
    height, width = pixels_THWC.shape[1:3]
    return Visual(
        pixels_THWC, grid=(height // spec.patch_size, width // spec.patch_size), tokens=height * width // spec.factor**2
    )


def pixel_segments(visuals: Sequence[Visual], spec: VisionSpec) -> Pixels:
    """Return the pixels of visuals of one shape as the vision graph reads them: (N, T, P, r, C * patch_size), uint8.

    The memory is the images' own, row after row, in segments as wide as a patch, so that a single visual is not copied.
    """
    pixels_NTHWC = np.stack([visual.pixels_THWC for visual in visuals]) if len(visuals) > 1 else visuals[0].pixels_THWC
    frames, patch = visuals[0].pixels_THWC.shape[0], spec.patch_size
    return np.ascontiguousarray(pixels_NTHWC).reshape(len(visuals), frames, -1, patch, 3 * patch)


@lru_cache(maxsize=256)
def vision_tables(grid_h: int, grid_w: int, spec: VisionSpec) -> VisionTables:
    """Return the tables of a grid of patches."""
    merge = spec.merge_size
    order = np.arange(grid_h * grid_w).reshape(grid_h // merge, merge, grid_w // merge, merge)
    row, column = np.divmod(order.transpose(0, 2, 1, 3).ravel(), grid_w)
    pixel_row_Pr = row[:, None] * spec.patch_size + np.arange(spec.patch_size)
    row_taps, row_weights = _taps(row, grid_h, spec.position_side)
    column_taps, column_weights = _taps(column, grid_w, spec.position_side)
    index = row_taps[:, :, None] * spec.position_side + column_taps[:, None, :]
    weight = row_weights[:, :, None] * column_weights[:, None, :]
    spatial = spec.head_dim // 2
    frequency = 1 / spec.rope_theta ** (np.arange(0, spatial, 2, dtype=np.float32) / np.float32(spatial))
    half = np.concatenate([row[:, None] * frequency, column[:, None] * frequency], axis=1)
    angle = np.concatenate([half, half], axis=1).astype(np.float32)
    return VisionTables(
        pixel_row_Pr * grid_w + column[:, None],
        index.reshape(-1, 4),
        weight.reshape(-1, 4),
        np.cos(angle),
        np.sin(angle),
    )


def _taps(place: Ints, size: int, side: int) -> tuple[Ints, Floats]:
    """Return the two nearest entries of a table of `side`, stretched over `size`, and their linear weights."""
    source = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    fraction = source - floor
    taps = floor.astype(np.int64)[:, None] + np.arange(2)
    return taps.clip(0, side - 1), 1 - np.abs(fraction[:, None] - np.arange(2, dtype=np.float32))


def rotary_positions(ids: Sequence[int], visuals: Sequence[Visual], pad_ids: tuple[int, int], merge: int) -> Ints:
    """Return (3, S) positions along time, height and width; text counts on, a visual spans its grid.

    `pad_ids` are the ids of `<|image_pad|>` and `<|video_pad|>`, whose runs stand for `visuals` in order.
    """
    positions_3S = np.empty((3, len(ids)), np.int64)
    place = at = 0
    for visual in visuals:
        start = at
        while ids[start] not in pad_ids:
            start += 1
        positions_3S[:, at:start] = np.arange(place, place + start - at)
        place += start - at
        at = start + visual.tokens
        rows, columns = visual.grid[0] // merge, visual.grid[1] // merge
        row, column = np.divmod(np.arange(visual.tokens), columns)
        positions_3S[:, start:at] = place
        positions_3S[1, start:at] += row
        positions_3S[2, start:at] += column
        place += max(rows, columns)
    positions_3S[:, at:] = np.arange(place, place + len(ids) - at)
    return positions_3S
