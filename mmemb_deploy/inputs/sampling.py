"""Which frames of a video file are read: by transformers' rule, or by that of Qwen3-VL-Embedding's script.

Follows transformers' `Qwen3VLVideoProcessor.sample_frames` (2 frames a second, 4 to 768 of them) and qwen-vl-utils'
`smart_nframes` with what the script passes (1 frame a second, 4 to 64, an even number). Both spread the frames evenly
from the first to the last. Where qwen-vl-utils takes no video of a single frame, that frame is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mmemb_deploy.inputs.preprocess import Resize

MIN_FRAMES = 4  # however short the video, if it has them
FPS: dict[Resize, float] = {"transformers": 2.0, "qwen-vl-utils": 1.0}
MAX_FRAMES: dict[Resize, int] = {"transformers": 768, "qwen-vl-utils": 64}
FRAME_FACTOR = 2  # of qwen-vl-utils, which reads whole temporal patches


@dataclass(frozen=True)
class Sampling:
    """What an input asks of its video file. None is the library's own."""

    fps: float | None = None  # frames a second
    max_frames: int | None = None
    start: float = 0.0  # seconds, from the first frame
    end: float | None = None


def frame_count(total: int, rate: float, sampling: Sampling, resize: Resize, limit: int) -> int:
    """Return how many of `total` frames, which come `rate` a second on average, are read: 1 to `limit`."""
    most = min(MAX_FRAMES[resize], limit) if sampling.max_frames is None else sampling.max_frames
    wanted = min(total / rate * (FPS[resize] if sampling.fps is None else sampling.fps), float(total))
    if resize == "qwen-vl-utils":
        count = min(max(wanted, MIN_FRAMES), most // FRAME_FACTOR * FRAME_FACTOR, total)
        return max(1, math.floor(count / FRAME_FACTOR) * FRAME_FACTOR)
    return min(max(int(wanted), MIN_FRAMES), most, total)


def frame_indices(first: int, last: int, count: int, resize: Resize) -> list[int]:
    """Return the indices of `count` frames, spread evenly from the first to the last."""
    if resize == "qwen-vl-utils" and count > 1:
        # torch.linspace in float32, which counts from both ends
        step = (np.float32(last) - np.float32(first)) / np.float32(count - 1)
        steps = np.arange(count, dtype=np.float32)
        places = np.where(steps < count // 2, np.float32(first) + step * steps, np.float32(last) - step * steps[::-1])
    else:
        places = np.linspace(first, last, count)
    return [int(index) for index in places.round()]
