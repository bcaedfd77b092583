"""The sampled frames of a video file, by PyAV; runs in the process of `decoder_process`.

Frames are chosen by `sampling` among those that the file holds, in the order in which they are shown. Their times are
the container's, counted from its first frame, so that those of a variable rate are true. A rotation flag is applied.
Each frame is resized to what the model reads as soon as it is decoded, and only sampled ones are converted and kept.

To reach a frame, decoding starts at the key frame before it. Where that would decode more than EXACT_PIXELS for each
second of the time limit, as in a file of hours, a frame gives way to a key frame that is nearer to it than half of the
way to the next sampled one.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.images import pixel_size
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.preprocess import Pixels, VisionSpec, resize_file_frame, resized_video_size
from mmemb_deploy.inputs.sampling import Sampling, frame_count, frame_indices

# No format that names other files or addresses to read, as playlists do.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg"
SHOWN_FORMATS = "MP4, MOV, 3GP, Matroska, WebM, AVI, MPEG, FLV, WMV, Ogg"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
INDEXED_FORMATS = "mov"  # whose header names every frame that is shown
EXACT_PIXELS = 100_000_000  # decoded in a second by a busy core
THREADS = 4
MOST_BACK = 3  # key frames before a frame at which decoding starts
LATE = 1.5  # frames that the last one may stand for another


@dataclass(frozen=True)
class Index:
    """The frames of a file in the order in which they are shown, without decoding them."""

    ticks: tuple[int, ...]  # times, from the first frame on where `timed`, else the places of the frames
    keys: tuple[int, ...]  # of those, key frames
    tick: float  # seconds
    origin: int  # tick of the first frame in the container
    rate: float  # frames a second, on average
    timed: bool  # whether every frame has a time in the container
    size: tuple[int, int]  # (width, height) that the header names, before it is turned

    def seconds(self, place: int) -> float:
        """Return the time of a frame."""
        return self.ticks[place] * self.tick


def read_frames(
    source: str | bytes, sampling: Sampling, limits: Limits, vision: VisionSpec
) -> tuple[list[Pixels], list[float]]:
    """Return the sampled frames, uint8 (H, W, 3) of one size, and their times in seconds.

    Raises InputError, whose message goes on after the file's name, for a file that holds no frames, cannot be decoded,
    or is above a limit.
    """
    index = _index(source)
    first, last = _range(index, sampling)
    total = last - first + 1
    count = frame_count(total, index.rate, sampling, vision.resize, limits.max_frames)
    places = frame_indices(first, last, count, vision.resize)
    _check_pixels(*index.size, limits)
    places = reachable(index, places, EXACT_PIXELS * limits.max_media_seconds / max(1, math.prod(index.size)))
    frames: list[Pixels] = []
    native = size = (0, 0)
    for frame in _frames(source, index, places):
        _check_pixels(frame.width, frame.height, limits)
        image = _upright(frame)
        if not frames:
            native, size = image.size, resized_video_size(count, image.height, image.width, vision, file=True)
        if image.size != native:
            raise InputError(
                f"has frames of {pixel_size(native)} and of {pixel_size(image.size)} pixels; encode it anew in one size"
            )
        frames.append(resize_file_frame(image, size, vision))
    return frames, [index.seconds(place) for place in places]


def duration(source: str | bytes) -> float:
    """Return the seconds from the first frame to the end of the last one. Raises InputError as `read_frames`."""
    index = _index(source)
    return index.seconds(-1) + 1 / index.rate


def _range(index: Index, sampling: Sampling) -> tuple[int, int]:
    """Return the places of the first and the last frame from `start` to `end`, both included."""
    first = bisect_left(index.ticks, sampling.start / index.tick - 1e-6)
    last = len(index.ticks) - 1
    if sampling.end is not None:
        last = bisect_right(index.ticks, sampling.end / index.tick + 1e-6) - 1
    if first > last:
        until = "" if sampling.end is None else f" to 'end' = {sampling.end:g} s"
        raise InputError(
            f"has no frame from 'start' = {sampling.start:g} s{until}: its frames lie within "
            f"0..{index.seconds(-1):.3f} s"
        )
    return first, last


@contextmanager
def _opened(source: str | bytes) -> Generator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first video track."""
    with _readable():
        file: Any = f"file:{source}" if isinstance(source, str) else io.BytesIO(source)
        with av.open(file, options=OPTIONS, metadata_errors="ignore") as container:
            assert isinstance(container, InputContainer)
            stream = _track(container)
            stream.codec_context.thread_type = "AUTO"
            stream.codec_context.thread_count = THREADS
            yield container, stream


def _track(container: InputContainer) -> VideoStream:
    shown = [stream for stream in container.streams.video if not _is_cover(stream)]
    for stream in container.streams:
        stream.discard = Discard.default if shown and stream.index == shown[0].index else Discard.all
    if not shown:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        raise InputError(f"has no video track ({', '.join(kinds) or 'no track at all'}); pass a file with pictures")
    if cast("object", shown[0].codec_context) is None:
        raise InputError("has a video track of a codec that is not known; encode it anew, as H.264")
    return shown[0]


def _is_cover(stream: VideoStream) -> bool:
    return Disposition.attached_pic in stream.disposition


@contextmanager
def _readable() -> Generator[None]:
    """Say as an InputError why FFmpeg cannot read a file."""
    try:
        yield
    except FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise InputError(f"cannot be decoded ({error.strerror}); pass a whole video: {SHOWN_FORMATS}") from error


def _index(source: str | bytes) -> Index:
    if isinstance(source, bytes):
        return _scan(source)
    facts = Path(source).stat()
    return _remembered(source, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4)
def _remembered(path: str, size: int, changed: int) -> Index:  # noqa: ARG001 - a file that changed is another one
    return _scan(path)


def _scan(source: str | bytes) -> Index:
    """Read a file's packets through."""
    ticks: list[int] = []
    keys: list[int] = []
    packets, timed = 0, True
    with _opened(source) as (container, stream):
        for packet in _packets(container, stream):
            if not packet.size:
                continue  # the last one, which flushes the decoder
            packets += 1
            if packet.is_discard:
                continue
            timed = timed and packet.pts is not None
            tick = packet.pts if packet.pts is not None else len(ticks)
            ticks.append(tick)
            if packet.is_keyframe:
                keys.append(tick)
        size = stream.width, stream.height
        tick_seconds = float(stream.time_base or 0)
        average = float(stream.average_rate or 0)
        named = len(stream.index_entries) if container.format.name.startswith(INDEXED_FORMATS) else 0
        if packets < named:
            raise InputError(f"is cut short: it has {packets} of the {named} frames that it names; pass it whole")
    if not ticks:
        raise InputError("has no frames; pass a video that shows something")
    if timed and tick_seconds > 0:
        ticks.sort()
        span = (ticks[-1] - ticks[0]) * tick_seconds
        rate = average if average > 0 else (len(ticks) - 1) / span if span > 0 else 1.0
        origin = ticks[0]
        shifted = tuple(tick - origin for tick in ticks)
        return Index(shifted, tuple(sorted(key - origin for key in keys)), tick_seconds, origin, rate, True, size)
    if average <= 0:
        raise InputError("has neither times nor a rate of its frames; encode it anew, as MP4")
    return Index(tuple(range(len(ticks))), (), 1 / average, 0, average, False, size)


def reachable(index: Index, places: Sequence[int], budget: float) -> list[int]:
    """Return the places, some moved to key frames where more than `budget` frames would be decoded for them."""
    keys = [bisect_left(index.ticks, key) for key in index.keys]
    decoded, at = 0, -1
    for place in places:
        key = keys[max(0, bisect_right(keys, place) - 1)] if keys else 0
        decoded += place - max(key - 1, at)
        at = place
    if decoded <= budget or not keys:
        return list(places)
    moved: list[int] = []
    for number, place in enumerate(places):
        near = bisect_left(keys, place)
        key = min(keys[max(0, near - 1) : near + 1], key=lambda each: abs(each - place))
        gaps = [
            abs(place - other) for other in (*places[max(0, number - 1) : number], *places[number + 1 : number + 2])
        ]
        near_enough = gaps and 2 * abs(key - place) < min(gaps) and places[0] <= key <= places[-1]
        moved.append(key if near_enough else place)
    return moved


def _frames(source: str | bytes, index: Index, places: Sequence[int]) -> Iterator[VideoFrame]:
    """Decode the frames at some places, rising: by seeking, or where a frame does not come so, from the beginning."""
    found = 0
    if index.timed:
        for frame in _sought(source, index, [index.origin + index.ticks[place] for place in places]):
            found += 1
            yield frame
    if found < len(places):
        yield from _counted(source, index, [index.ticks[place] for place in places[found:]])


def _sought(source: str | bytes, index: Index, ticks: Sequence[int]) -> Iterator[VideoFrame]:
    """Decode from the key frame before each frame, up to the first that does not come at its time.

    Where a container leads behind a key frame, as MPEG's do, decoding starts at one before it.
    """
    wanted = frozenset(ticks)
    with _opened(source) as (container, stream):
        stream.codec_context.open(strict=False)  # some decoders ask only now which frames to skip: none

        def from_key(number: int) -> Iterator[VideoFrame]:
            container.seek(index.origin + (index.keys[number] if number >= 0 else 0), stream=stream)
            return _decoded(container, stream, wanted)

        frames = _decoded(container, stream, wanted)
        reached = index.origin  # the container stands at its beginning
        back = 1
        for tick in ticks:
            before = bisect_right(index.keys, tick - index.origin)
            if before and index.origin + index.keys[before - 1] > reached:
                frames = from_key(before - back)
            frame = _at(tick, frames)
            while frame is None and back < MOST_BACK:
                back += 1
                frame = _at(tick, frames := from_key(before - back))
            if frame is None:
                return
            reached = tick
            yield frame


def _at(tick: int, frames: Iterator[VideoFrame]) -> VideoFrame | None:
    """Return the next frame that is not before a tick, if it is the one."""
    frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= tick), None)
    return frame if frame is not None and frame.pts == tick else None


def _decoded(container: InputContainer, stream: VideoStream, wanted: frozenset[int]) -> Iterator[VideoFrame]:
    """Decode from here on, but for frames that are not wanted and that no other frame needs."""
    for packet in _packets(container, stream):
        needed = packet.pts is None or packet.pts in wanted or not packet.size
        stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        yield from packet.decode()


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    try:
        yield from container.demux(stream)
    except IndexError as error:  # PyAV counts the tracks when it opens a file
        raise InputError("begins another track in its midst; encode it anew, as MP4") from error


def _counted(source: str | bytes, index: Index, ticks: Sequence[int]) -> Iterator[VideoFrame]:
    """Decode everything, and yield for each tick the first frame that is not before it."""
    left = list(reversed(ticks))
    latest, reached = None, 0
    with _opened(source) as (container, stream):
        every = (frame for packet in _packets(container, stream) for frame in packet.decode())
        for place, frame in enumerate(every):
            if index.timed and frame.pts is None:
                continue
            latest, reached = frame, frame.pts - index.origin if index.timed and frame.pts is not None else place
            while left and left[-1] <= reached:
                left.pop()
                yield frame
            if not left:
                return
    for tick in reversed(left):  # the last frame of an interlaced file is two packets
        if latest is None or (tick - reached) * index.tick > LATE / index.rate:
            raise InputError(
                f"is damaged: there is no frame at {tick * index.tick:.3f} s; pass it whole, or an earlier 'end'"
            )
        yield latest


def _upright(frame: VideoFrame) -> Image.Image:
    """Return a frame as RGB, turned as its rotation flag says."""
    quarters = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters)))


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_image_pixels:
        raise InputError(
            f"has frames of {pixel_size((width, height))} pixels, above max_image_pixels = {limits.max_image_pixels}; "
            "scale it down"
        )
