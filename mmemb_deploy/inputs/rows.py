"""One input as the decoder reads it (a Row), and several of them as one padded batch.

Axes: S tokens of a row, B rows, T padded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mmemb_deploy.inputs.parse import Request
from mmemb_deploy.inputs.preprocess import (
    Ints,
    VisionSpec,
    Visual,
    patch_times,
    resize_image,
    resize_video,
    rotary_positions,
    temporal_patches,
)
from mmemb_deploy.inputs.prompts import IMAGE_PAD, VIDEO_PAD, PromptEncoder


@dataclass(frozen=True)
class Row:
    """Token ids (S,), rotary positions (3, S), and the visuals that the pad tokens stand for, in order."""

    token_ids_S: Ints
    position_ids_3S: Ints
    visuals: tuple[Visual, ...]
    visual_index_S: Ints  # 1 + the visual token's index in this row, 0 for a word
    prefix: int = 0  # tokens at its start that do not depend on the input: system message and instruction

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.token_ids_S)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the row."""
        return sum(visual.tokens for visual in self.visuals)

    @property
    def next_position(self) -> int:
        """Rotary position of the token that follows the row."""
        return int(self.position_ids_3S.max()) + 1

    def __reduce__(self) -> tuple[Callable[..., Row], tuple[Any, ...]]:
        """Pickle the numbers alone, in a fifth of the time that arrays take."""
        numbers = (self.token_ids_S, self.position_ids_3S, self.visual_index_S)
        return _row, ([each.tobytes() for each in numbers], self.visuals, self.prefix)

    def extended(self, ids: Sequence[int]) -> Row:
        """Return the row with text tokens appended."""
        positions = np.arange(len(ids)) + self.next_position
        return replace(
            self,
            token_ids_S=np.concatenate([self.token_ids_S, np.asarray(ids, np.int64)]),
            position_ids_3S=np.concatenate([self.position_ids_3S, np.tile(positions, (3, 1))], axis=1),
            visual_index_S=np.concatenate([self.visual_index_S, np.zeros(len(ids), np.int64)]),
        )


def _row(numbers: Sequence[bytes], visuals: tuple[Visual, ...], prefix: int) -> Row:
    token_ids_S, positions, visual_index_S = (np.frombuffer(each, np.int64) for each in numbers)
    return Row(token_ids_S, positions.reshape(3, -1), visuals, visual_index_S, prefix)


@dataclass(frozen=True)
class Shown:
    """What the vision tower sees of a request, resized: images, and a video's temporal patches with their seconds."""

    images: list[Visual]
    frames: list[Visual]
    times: list[float]


class RowEncoder:
    """Turns requests into rows, with one prompt format and one vision tower."""

    def __init__(self, prompt: PromptEncoder, vision: VisionSpec) -> None:
        self.prompt = prompt
        self.vision = vision
        self._pads = prompt.ids[IMAGE_PAD], prompt.ids[VIDEO_PAD]

    def row(self, request: Request, instruction: str) -> Row:
        """Resize, tokenise and lay out one request. Raises InputError for an image that cannot be resized."""
        shown = self.shown(request)
        ids = self.prompt.prompt(
            instruction,
            request.text,
            image_tokens=[image.tokens for image in shown.images],
            video_tokens=[(seconds, frame.tokens) for seconds, frame in zip(shown.times, shown.frames, strict=True)],
        )
        images, frames = shown.images, shown.frames
        visuals = (*frames, *images) if self.prompt.layout.video_first else (*images, *frames)
        token_ids_S = np.asarray(ids, np.int64)
        return Row(
            token_ids_S,
            rotary_positions(ids, visuals, self._pads, self.vision.merge_size),
            visuals,
            self._visual_index(token_ids_S) if visuals else np.zeros_like(token_ids_S),
            self.prompt.prefix_length(instruction),
        )

    def _visual_index(self, token_ids_S: Ints) -> Ints:
        image, video = self._pads
        shown_S = (token_ids_S == image) | (token_ids_S == video)
        return np.where(shown_S, shown_S.cumsum(), 0)

    def shown(self, request: Request) -> Shown:
        """Resize what a request shows. Raises InputError for an image that cannot be resized."""
        return Shown(
            images=[resize_image(image, self.vision) for image in request.images],
            frames=self._frames(request) if request.frames else [],
            times=patch_times(request.timestamps, request.next_timestamp, self.vision) if request.frames else [],
        )

    def _frames(self, request: Request) -> list[Visual]:
        if request.fitted is None:
            return resize_video(request.frames, self.vision)
        assert request.fitted == self.vision, "frames of a file are read for one vision tower: parse(..., vision)"
        return temporal_patches([np.asarray(frame) for frame in request.frames], self.vision)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. `visual_index_BT` counts through the visuals of all rows; 0 is a word or padding."""

    token_ids_BT: Ints
    position_ids_3BT: Ints
    mask_BT: Ints
    visual_index_BT: Ints
    next_position_B: Ints  # rotary position of the token that follows each row
    visuals: tuple[Visual, ...]
    prefix: int  # tokens at the start of every row that are the same in all and do not depend on the inputs

    @cached_property
    def last_B(self) -> Ints:
        """Place of each row's last token."""
        last: Ints = self.mask_BT.sum(axis=1) - 1
        return last


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad rows to the longest of them."""
    shape = len(rows), max(row.length for row in rows)
    token_ids_BT = np.full(shape, pad_id, np.int64)
    position_ids_3BT = np.zeros((3, *shape), np.int64)
    mask_BT, visual_index_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    before = 0
    for index, row in enumerate(rows):
        token_ids_BT[index, : row.length] = row.token_ids_S
        position_ids_3BT[:, index, : row.length] = row.position_ids_3S
        mask_BT[index, : row.length] = 1
        visual_index_BT[index, : row.length] = np.where(row.visual_index_S > 0, row.visual_index_S + before, 0)
        before += row.visual_tokens
    visuals = tuple(visual for row in rows for visual in row.visuals)
    next_position_B = np.array([row.next_position for row in rows], np.int64)
    return Batch(
        token_ids_BT, position_ids_3BT, mask_BT, visual_index_BT, next_position_B, visuals, _shared_prefix(rows)
    )


def _shared_prefix(rows: Sequence[Row]) -> int:
    first = rows[0]
    same = all(
        row.prefix == first.prefix and np.array_equal(row.token_ids_S[: row.prefix], first.token_ids_S[: first.prefix])
        for row in rows[1:]
    )
    return first.prefix if same else 0


def by_shape(visuals: Sequence[Visual]) -> list[list[int]]:
    """Group the indices of visuals by their frames and size, so that each group can be encoded as one batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, visual in enumerate(visuals):
        groups.setdefault(visual.pixels_THWC.shape, []).append(index)
    return list(groups.values())
