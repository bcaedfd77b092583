"""Frames of a video file equal those that transformers and qwen-vl-utils sample; what is no video is refused.

Two differences are chosen: a rotation flag is applied, and times are the container's, where both libraries count frames
at the average rate. The videos are made here, by PyAV.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.nn import functional as F
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata, read_video_pyav

from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs import video
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.media import duration
from mmemb_deploy.inputs.parse import Request, parse
from mmemb_deploy.inputs.preprocess import QWEN3_VL, resized_video_size
from mmemb_deploy.inputs.sampling import Sampling, frame_count, frame_indices
from mmemb_deploy.inputs.video import Index, reachable
from mmemb_deploy.preparer import row_encoder

Pixels = NDArray[np.uint8]
MakeClip = Callable[..., Path]
SCRIPT = replace(  # the bounds of Qwen3-VL-Embedding's inference script
    QWEN3_VL,
    resize="qwen-vl-utils",
    min_pixels=4 * 32 * 32,
    max_pixels=1800 * 32 * 32,
    video_min_pixels=128 * 32 * 32,
    video_max_pixels=7680 * 32 * 32,
)
IRREGULAR = (0, 100, 150, 300, 900, 1000, 1500, 1510, 1600, 2000, 2600, 2700, 3000, 3900, 4000, 4100, 4150, 5000)


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A frame that differs from all others, and shows which way is up."""
    width, height = size
    image = Image.new("RGB", size, (5 * number % 256, 60, 200 - 3 * number % 200))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 3, height // 4), fill="white")
    draw.ellipse((number % width, height // 2, number % width + width // 4, height - 2), fill="yellow")
    return image


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    """Write a video; `times` are milliseconds, one for each frame."""

    def make(
        name: str = "clip.mp4",
        *,
        frames: int = 50,
        size: tuple[int, int] = (96, 64),
        rate: Fraction | int = 25,
        codec: str = "libx264",
        pixels: str = "yuv420p",
        rotation: int = 0,
        times: Sequence[int] | None = None,
        container: str | None = None,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w", format=container) as output:
            stream: Any = output.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, pixels, 12
            if rotation:
                stream.set_display_rotation(rotation)
            if times is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            for number in range(frames if times is None else len(times)):
                frame = av.VideoFrame.from_ndarray(np.asarray(picture(number, size)), format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return path

    return make


def read(path: Path, spec: Any = QWEN3_VL, limits: Limits = Limits(), **keys: Any) -> Request:  # noqa: B008
    return parse({"video": path} | keys, limits, spec)


def arrays(frames: Sequence[Image.Image]) -> list[Pixels]:
    return [np.asarray(frame) for frame in frames]


def scaled(frames: Sequence[Pixels]) -> list[Pixels]:
    """Return frames in the size that a Qwen3-VL reads them, resized by Pillow."""
    height, width = resized_video_size(len(frames), frames[0].shape[0], frames[0].shape[1], QWEN3_VL)
    return [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]


def decoded(path: Path) -> tuple[list[Pixels], list[float]]:
    """Return every frame of a video and its time, decoded from the beginning to the end."""
    with av.open(str(path)) as container:
        frames: list[tuple[Any, float]] = [
            (frame.to_ndarray(format="rgb24"), frame.time or 0.0) for frame in container.decode(video=0)
        ]
    return [pixels for pixels, _ in frames], [seconds - frames[0][1] for _, seconds in frames]


def of_transformers(path: Path, **asked: Any) -> tuple[list[Pixels], VideoMetadata]:
    """Return what transformers samples of a video, and its metadata."""
    processor = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    sample = vars(Qwen3VLVideoProcessor)["sample_frames"]
    read: Any = read_video_pyav
    frames, metadata = read(str(path), lambda metadata, **_: sample(processor, metadata=metadata, **asked))
    return list(frames), metadata


def of_qwen_vl_utils(name: str) -> Any:
    """Return a function of qwen-vl-utils, whose module needs torchvision to be imported."""
    spec = importlib.util.find_spec("qwen_vl_utils")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).with_name("vision_process.py").read_text())
    wanted = {"round_by_factor", "ceil_by_factor", "floor_by_factor", name}
    constants = {"FPS", "FRAME_FACTOR", "FPS_MIN_FRAMES", "FPS_MAX_FRAMES"}
    kept: list[ast.stmt] = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name in wanted)
        or (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in constants)
        or (isinstance(node, ast.ImportFrom) and node.module == "typing")
    ]
    names: dict[str, Any] = {"math": math, "logger": logging.getLogger("qwen_vl_utils")}
    exec(compile(ast.Module(kept, []), spec.origin, "exec"), names)
    return names[name]


def script_places(total: int, rate: float, **asked: Any) -> list[int]:
    """Return the frames that Qwen3-VL-Embedding's script has qwen-vl-utils read."""
    count = of_qwen_vl_utils("smart_nframes")({"fps": 1, "max_frames": 64} | asked, total, rate)
    places: list[int] = torch.linspace(0, total - 1, count).round().long().tolist()
    return places


# ---- which frames


def test_as_many_frames_as_transformers_samples() -> None:
    processor = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    draw = random.Random(0)
    for _ in range(2000):
        total, rate = (
            draw.randint(1, draw.choice((10, 500, 200_000))),
            draw.choice((1.0, 12.5, 24000 / 1001, 25.0, 60.0)),
        )
        fps = draw.choice((None, 0.1, 1.0, 7.5, 100.0))
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        expected = vars(Qwen3VLVideoProcessor)["sample_frames"](processor, metadata=metadata, fps=fps)
        count = frame_count(total, rate, Sampling(fps=fps), "transformers", 768)
        assert frame_indices(0, total - 1, count, "transformers") == expected.tolist()


def test_as_many_frames_as_the_script_has_qwen_vl_utils_read() -> None:
    draw = random.Random(0)
    smart_nframes = of_qwen_vl_utils("smart_nframes")
    for _ in range(2000):
        total, rate = (
            draw.randint(2, draw.choice((10, 500, 20_000))),
            draw.choice((1.0, 12.5, 24000 / 1001, 25.0, 60.0)),
        )
        fps, most = draw.choice((0.1, 1.0, 7.5, 100.0)), draw.choice((2, 3, 16, 64))
        expected = smart_nframes({"fps": fps, "max_frames": most}, total, rate)
        assert frame_count(total, rate, Sampling(fps=fps, max_frames=most), "qwen-vl-utils", 768) == expected
        first = draw.randrange(1000)
        spread = torch.linspace(first, first + total - 1, expected).round().long().tolist()
        assert frame_indices(first, first + total - 1, expected, "qwen-vl-utils") == spread


def test_a_video_of_one_frame_is_read_by_either_rule(make_clip: MakeClip) -> None:
    path = make_clip(frames=1)
    for spec in (QWEN3_VL, SCRIPT):
        request = read(path, spec)
        assert (len(request.frames), request.timestamps) == (1, (0.0,))


@pytest.mark.parametrize(
    "clip",
    [
        {},
        {"frames": 3},
        {"frames": 130, "rate": Fraction(30000, 1001)},
        {"name": "odd.mp4", "size": (129, 95), "pixels": "yuv444p"},
        {"times": IRREGULAR},
        {"name": "clip.avi", "codec": "mpeg4"},
    ],
    ids=["25 fps", "3 frames", "29.97 fps", "odd", "variable", "avi"],
)
@pytest.mark.parametrize("asked", [{}, {"fps": 5.0}])
def test_frames_equal_those_that_transformers_samples(
    make_clip: MakeClip, clip: dict[str, Any], asked: dict[str, Any]
) -> None:
    path = make_clip(**clip)
    request = read(path, **asked)
    expected, metadata = of_transformers(path, **asked)
    np.testing.assert_array_equal(arrays(request.frames), scaled(expected))
    if "times" not in clip:
        np.testing.assert_allclose(request.timestamps, metadata.timestamps, atol=1e-6)


@pytest.mark.parametrize("frames", [5, 50, 200])
def test_frames_equal_those_that_the_script_has_qwen_vl_utils_read(make_clip: MakeClip, frames: int) -> None:
    path = make_clip(frames=frames)
    places = script_places(frames, 25.0)
    every, times = decoded(path)
    request = read(path, SCRIPT)
    assert request.timestamps == pytest.approx([times[place] for place in places])
    size = resized_video_size(len(places), 64, 96, SCRIPT, file=True)
    stacked = torch.from_numpy(np.stack([every[place] for place in places])).permute(0, 3, 1, 2).float()
    resized = F.interpolate(stacked, size, mode="bicubic", antialias=True).clamp(0, 255).round()
    difference = np.abs(np.stack(arrays(request.frames)) - resized.permute(0, 2, 3, 1).numpy())
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("clip.mp4", "libx264", None),
        ("clip.mkv", "libx264", None),
        ("clip.webm", "libvpx-vp9", None),
        ("clip.avi", "mpeg4", None),
        ("clip.m2ts", "libx264", "mpegts"),
        ("clip.mpg", "mpeg2video", None),
        ("clip.flv", "flv", None),
        ("clip.wmv", "wmv2", None),
    ],
)
def test_a_frame_is_the_same_however_it_is_reached(
    make_clip: MakeClip, name: str, codec: str, container: str | None
) -> None:
    path = make_clip(name, codec=codec, container=container)
    every, times = decoded(path)
    whole = read(path, fps=25.0)
    np.testing.assert_array_equal(arrays(whole.frames), scaled(every))
    assert whole.timestamps == pytest.approx(times, abs=2e-3)
    jumps = parse({"video": path.read_bytes(), "max_frames": 3})
    places = frame_indices(0, len(every) - 1, 3, "transformers")
    np.testing.assert_array_equal(arrays(jumps.frames), scaled([every[place] for place in places]))


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("clip.mp4", "libx264", None),
        ("clip.mkv", "libx264", None),
        ("clip.webm", "libvpx-vp9", None),
        ("clip.m2ts", "libx264", "mpegts"),
        ("clip.flv", "flv", None),
        ("clip.wmv", "wmv2", None),
    ],
)
def test_a_few_frames_are_reached_without_decoding_what_is_before_them(
    make_clip: MakeClip, name: str, codec: str, container: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip(name, codec=codec, container=container, frames=100)

    def from_the_beginning(*_: Any) -> Any:
        raise AssertionError("the file is decoded from its beginning")

    monkeypatch.setattr(video, "_counted", from_the_beginning)
    frames, times = video.read_frames(str(path), Sampling(max_frames=3, start=1.3), Limits(), QWEN3_VL)
    assert len(frames) == 3
    assert times == pytest.approx([1.32, 2.64, 3.96], abs=0.05)


# ---- times


def test_times_are_the_container_s_where_the_rate_varies(make_clip: MakeClip) -> None:
    path = make_clip(times=IRREGULAR)
    request = read(path, fps=100.0)
    assert request.timestamps == pytest.approx([each / 1000 for each in IRREGULAR])
    assert duration(path) == pytest.approx(5.0, abs=0.5)


def test_start_and_end_take_the_frames_that_qwen_vl_utils_takes(make_clip: MakeClip) -> None:
    path = make_clip(frames=60)
    bounds = of_qwen_vl_utils("calculate_video_frame_range")
    for start, end in [(0.0, 1.0), (0.5, 2.0), (0.41, 1.99), (2.0, 9.0)]:
        first, last, _ = bounds({"video_start": start, "video_end": end}, 60, 25.0)
        request = read(path, fps=25.0, start=start, end=end)
        assert request.timestamps[0] == pytest.approx(first / 25)
        assert request.timestamps[-1] == pytest.approx(last / 25)
        assert len(request.frames) == last - first + 1


def test_a_duration_reaches_to_the_end_of_the_last_frame(make_clip: MakeClip) -> None:
    assert duration(make_clip(frames=50)) == pytest.approx(2.0)


# ---- orientation


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotation_flag_is_applied_as_the_file_format_defines_it(make_clip: MakeClip, rotation: int) -> None:
    path = make_clip(rotation=rotation, frames=4)
    every, _ = decoded(path)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix lies behind 40 bytes of other facts
    a, b, _, c, d, _, _, _, _ = struct.unpack(">9i", content[at : at + 36])
    quarters = {  # ISO/IEC 14496-12: (x, y) goes to (a x + c y, b x + d y), moved into the positive
        (0, 1, -1, 0): -1,
        (-1, 0, 0, -1): 2,
        (0, -1, 1, 0): 1,
    }[round(a / 65536), round(b / 65536), round(c / 65536), round(d / 65536)]
    upright = [np.ascontiguousarray(np.rot90(frame, quarters)) for frame in every]
    np.testing.assert_array_equal(arrays(read(path).frames), scaled(upright))


# ---- what reaches the model


def test_a_row_has_the_frames_as_they_were_read(make_clip: MakeClip) -> None:
    encoder = row_encoder(Bundle.open(NANO))
    path = make_clip(frames=75)
    request = parse({"video": path, "max_frames": 3}, Limits(), encoder.vision)
    row = encoder.row(request, "")
    shown = np.concatenate([visual.pixels_THWC for visual in row.visuals])
    np.testing.assert_array_equal(shown, [*arrays(request.frames), np.asarray(request.frames[-1])])
    with pytest.raises(AssertionError, match="read for one vision tower"):
        encoder.row(replace(request, fitted=SCRIPT), "")


def test_a_long_video_gives_way_to_key_frames_only_beyond_its_budget() -> None:
    every = Index(tuple(range(100_000)), tuple(range(0, 100_000, 100)), 0.04, 0, 25.0, True, (1920, 1080))
    places = frame_indices(0, 99_999, 64, "transformers")
    assert reachable(every, places, budget=10_000) == places
    moved = reachable(every, places, budget=1_000)
    assert max(abs(one - other) for one, other in zip(moved, places, strict=True)) < 100
    assert all(place % 100 == 0 for place in moved)
    assert reachable(every, [150, 60_000, 99_950], budget=1_000) == [150, 60_000, 99_950], "none beyond the ends"
    lone = replace(every, keys=(0,))
    assert reachable(lone, places, budget=1_000) == places, "no key frame is near enough"


# ---- what is refused


def broken(kind: str, path: Path) -> Path:
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut", "cannot be decoded .*pass a whole video: MP4"),
        ("empty", "is empty; pass a file that holds something"),
        ("text", "cannot be decoded .*pass a whole video: MP4"),
    ],
)
def test_a_broken_video_is_refused(make_clip: MakeClip, kind: str, words: str) -> None:
    path = broken(kind, make_clip())
    with pytest.raises(InputError, match=rf"^'video' \(.*clip.mp4'\) {words}"):
        read(path)


def test_a_sound_file_is_refused_as_one(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(InputError, match=r"has no video track \(audio\); pass a file with pictures"):
        read(path)


def test_a_video_of_no_frames_is_refused(make_clip: MakeClip) -> None:
    path = make_clip("none.avi", codec="mpeg4")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"movi") + 4])
    with pytest.raises(InputError, match="has no frames; pass a video that shows something"):
        read(path)


def copied(source: Path, path: Path, *, earlier: int = 0, **options: str) -> Path:
    """Write a video anew without encoding it, its times by so many ticks earlier."""
    with av.open(str(source)) as given, av.open(str(path), "w", options=options) as output:
        stream = output.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, stream
                output.mux(packet)
    return path


def test_a_trimmed_file_shows_what_is_left_of_it(make_clip: MakeClip, tmp_path: Path) -> None:
    path = copied(make_clip(), tmp_path / "trimmed.mp4", earlier=30 * 512, avoid_negative_ts="disabled")
    every, _ = decoded(path)
    assert len(every) == 20, "an edit list leaves 30 frames out, which the file still has"
    np.testing.assert_array_equal(arrays(read(path, fps=25.0).frames), scaled(every))


def test_a_file_that_names_more_frames_than_it_has_is_refused(make_clip: MakeClip, tmp_path: Path) -> None:
    path = copied(make_clip(), tmp_path / "fast.mp4", movflags="faststart")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 1000])
    with pytest.raises(InputError, match=r"is cut short: it has \d+ of the 50 frames that it names; pass it whole"):
        read(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"start": 9}, r"has no frame from 'start' = 9 s: its frames lie within 0..1.960 s"),
        ({"start": 0.001, "end": 0.002}, "has no frame from 'start' = 0.001 s to 'end' = 0.002 s"),
        ({"start": 2, "end": 1}, "'start' is 2 s and 'end' is 1 s; pass seconds from 0 on, the end after the start"),
        ({"start": -1}, "'start' is -1 s and 'end' is not given"),
        ({"end": "1"}, "'end' is '1'; pass a finite number"),
        ({"fps": 0}, "'fps' is 0.0; pass the frames per second, above 0"),
        ({"max_frames": 0}, "'max_frames' is 0; pass a whole number from 1 to max_frames = 768"),
        ({"max_frames": 769}, "'max_frames' is 769; pass a whole number from 1 to max_frames = 768"),
        ({"max_frames": 2.0}, r"'max_frames' is 2.0; pass a whole number"),
        ({"timestamps": [0.0]}, "'timestamps' are those of frames, and a video file has its own"),
    ],
)
def test_what_is_asked_of_a_video_is_checked(make_clip: MakeClip, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(make_clip(), **keys)


@pytest.mark.parametrize("key", ["max_frames", "start", "end"])
def test_frames_are_not_sampled(key: str) -> None:
    with pytest.raises(InputError, match=f"'{key}' says what to take of a video file, and 'video' holds frames"):
        parse({"video": [picture(0, (8, 8))], key: 1})


@pytest.mark.parametrize("key", ["fps", "timestamps", "max_frames", "start", "end"])
def test_what_is_asked_of_no_video_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=f"'{key}' is given without a 'video'"):
        parse({"text": "a", key: 1})


def test_limits_bound_a_file_s_bytes_frames_and_pixels(make_clip: MakeClip) -> None:
    path = make_clip()
    with pytest.raises(InputError, match=r"bytes, above max_media_bytes = 100; pass a smaller one"):
        read(path, limits=Limits(max_media_bytes=100))
    with pytest.raises(InputError, match="has frames of 96 x 64 pixels, above max_image_pixels = 100"):
        read(path, limits=Limits(max_image_pixels=100))
    assert len(read(path, limits=Limits(max_frames=6), fps=25.0).frames) == 6
