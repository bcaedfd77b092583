"""What `parse` accepts, what it makes of it, and how it refuses the rest."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.parse import DEFAULT_FPS, Request, parse

Pixels = NDArray[np.uint8]
GREY = np.full((4, 6), 51, np.uint8)
RED = Image.new("RGB", (6, 4), (255, 0, 0))


def parsed(item: object, **limits: int) -> Request:
    return parse(item, Limits(**limits))


def pixels(item: object) -> Pixels:
    (image,) = parsed(item).images
    assert image.mode == "RGB"
    return np.asarray(image)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a picture and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


# ---- what is accepted


def test_a_string_is_text_even_where_it_names_a_file_or_an_address(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    RED.save(path)
    for text in (str(path), "https://example.org/photo.png", "<|image_pad|>"):
        assert parsed(text) == Request(text, (), (), ())


def test_an_image_comes_in_any_of_its_forms(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    RED.save(path)
    array = np.asarray(RED)
    forms: list[object] = [RED, array, array.astype(np.float32) / 255]
    forms += [{"image": form} for form in [*forms, path, str(path), encoded(RED), bytearray(encoded(RED))]]
    for form in forms:
        np.testing.assert_array_equal(pixels(form), array)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_every_documented_file_format_is_read(kind: str) -> None:
    assert pixels({"image": encoded(RED, kind)}).shape == (4, 6, 3)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_an_array_is_grey_rgb_or_rgba(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 51, np.uint8)
    if shape[2:] == (4,):
        array[..., 3] = 255
    np.testing.assert_array_equal(pixels(array), np.full((4, 6, 3), 51))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_float_array_is_scaled_from_0_to_1(dtype: type[np.floating[Any]]) -> None:
    np.testing.assert_array_equal(pixels((np.arange(256) / 255).astype(dtype)[None])[0, :, 0], np.arange(256))


def test_the_request_keeps_its_pixels_when_the_callers_change() -> None:
    array, image = GREY.copy(), Image.fromarray(GREY)
    request = parsed({"images": [array, image]})
    array[:] = 0
    image.paste(0, (0, 0, 6, 4))
    assert all((np.asarray(kept) == 51).all() for kept in request.images)


def test_several_images_keep_their_order_beside_the_text() -> None:
    request = parsed({"text": "which?", "images": [GREY, RED, encoded(RED)]})
    assert request.text == "which?"
    assert [image.getpixel((0, 0)) for image in request.images] == [(51, 51, 51), (255, 0, 0), (255, 0, 0)]


def test_no_images_in_the_list_is_fine_beside_a_text() -> None:
    assert parsed({"text": "alone", "images": []}) == Request("alone", (), (), ())


def test_transparency_is_laid_over_white() -> None:
    assert (pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 0))) == 255).all()
    assert (pixels(np.zeros((2, 2, 4), np.uint8)) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_images_are_scaled_and_not_clipped(kind: str) -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1)))
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    expected = np.tile(np.linspace(0, 255, 64), (64, 1))
    assert np.abs(pixels({"image": encoded(ramp, kind, **options)})[..., 0] - expected).max() <= 0.51


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_modes_of_either_byte_order_are_scaled(mode: str) -> None:
    assert (pixels(Image.new(mode, (2, 2), 257 * 51)) == 51).all()


def test_a_float_image_within_0_to_1_is_scaled() -> None:
    assert (pixels(Image.new("F", (2, 2), 0.2)) == 51).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int) -> None:
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(pixels({"image": data})[..., 0], upright)


def test_the_first_picture_of_an_animation_counts() -> None:
    data = encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4), (0, 0, 255))])
    assert tuple(pixels({"image": data})[0, 0]) == (255, 0, 0)


def test_video_frames_without_times_are_two_a_second() -> None:
    request = parsed({"video": [RED, GREY, RED]})
    assert DEFAULT_FPS == 2.0
    assert request.timestamps == (0.0, 0.5, 1.0)
    assert request.next_timestamp == 1.5
    assert [frame.mode for frame in request.frames] == ["RGB"] * 3
    assert request.images == ()


def test_a_video_is_a_list_of_images_or_one_array() -> None:
    array = np.stack([np.asarray(RED)] * 2)
    for video in (array, list(array), (RED, encoded(RED))):
        request = parsed({"video": video, "fps": 4})
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in request.frames]), array)
        assert request.timestamps == (0.0, 0.25)


@pytest.mark.parametrize("times", [[0, 1.5, 1.5], (0, 1.5, 1.5), np.array([0, 1.5, 1.5], np.float32)])
def test_timestamps_are_taken_as_given(times: object) -> None:
    request = parsed({"text": "clip", "video": [RED] * 3, "timestamps": times})
    assert request.timestamps == (0.0, 1.5, 1.5)
    assert all(type(time) is float for time in request.timestamps)


@pytest.mark.parametrize(("times", "following"), [([0.5], 1.0), ([0.5, 2.0], 3.5), ([0.0, 3.0, 3.0], 3.0)])
def test_the_next_frame_would_come_after_the_last_gap(times: list[float], following: float) -> None:
    assert parsed({"video": [RED] * len(times), "timestamps": times}).next_timestamp == following


def test_any_real_number_is_a_frame_rate() -> None:
    for fps in (1, 1.0, np.float32(1), np.int64(1), Fraction(1)):
        assert parsed({"video": [RED] * 2, "fps": fps}).timestamps == (0.0, 1.0)


# ---- what is refused


class Anything:
    """A type that nobody announced."""


REFUSALS: list[tuple[object, str]] = [
    (None, r"input of type NoneType is not accepted: pass a str, a PIL image, an array or a dict"),
    (3, r"input of type int is not accepted"),
    (["a", "b"], r"input of type list is not accepted"),
    (Anything(), r"input of type Anything is not accepted"),
    (Path("photo.png"), r"not accepted.*for an image pass \{'image': \.\.\.\}"),
    (b"\x89PNG", r"type bytes is not accepted.*for an image pass"),
    ("", r"nothing to embed: give a text that is not blank, an image, a video or a document"),
    (" \n", r"nothing to embed"),
    ({}, r"nothing to embed"),
    ({"text": "", "images": []}, r"nothing to embed"),
    ({"imgae": RED}, r"key 'imgae' is not known: choose from text, image, .*did you mean 'image'\?"),
    ({1: "text"}, r"key '1' is not known: choose from text"),
    ({"text": "a", "image": None}, r"'image' is None; leave the key out"),
    ({"text": 3}, r"'text' is of type int; pass a str"),
    ({"text": b"a"}, r"'text' is of type bytes; pass a str"),
    ("a\ud800", r"'text' has a lone surrogate at character 1"),
    ({"image": RED, "images": [RED]}, r"'image' and 'images' are both given; put every image into 'images'"),
    ({"images": RED}, r"'images' is of type Image; pass a list of images"),
    ({"images": "photo.png"}, r"'images' is of type str; pass a list"),
    ({"images": np.zeros((2, 4, 6, 3), np.uint8)}, r"'images' is of type ndarray; pass a list"),
    ({"images": [RED, 3]}, r"'images'\[1\] is of type int; pass a PIL image, an array, bytes or a path"),
    ({"image": "https://example.org/a.png"}, r"'image' is the URL 'https://example.org/a.png'; download it first"),
    ({"image": Path("https://example.org/a.png")}, r"is the URL .*; download it first"),
    ({"image": "file:///etc/hosts"}, r"is the URL 'file:///etc/hosts'"),
    ({"image": "data:image/png;base64,iVBOR"}, r"is the URL 'data:.*pass the path or the bytes"),
    ({"image": "no-such-file.png"}, r"'image' is the path 'no-such-file.png', where there is no file"),
    ({"image": "a\0b"}, r"where there is no file"),
    ({"image": "x" * 100_000}, r"is the path 'x{99}\.\.\., where there is no file"),
    ({"image": b""}, r"'image' is no image of a known format; pass one of PNG, JPEG, WEBP"),
    ({"image": b"hello, this is not an image"}, r"is no image of a known format"),
    ({"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, r"is no image of a known format"),
    (Image.new("RGB", (0, 4)), r"'image' is 0 x 4 pixels, so it shows nothing; pass at least 1 x 1"),
    (np.zeros((4, 0, 3), np.uint8), r"'image' is 0 x 4 pixels, so it shows nothing"),
    (np.zeros((0, 4)), r"'image' is 4 x 0 pixels"),
    (np.zeros(5, np.uint8), r"array of shape \(5,\); pass \(height, width\) or \(height, width, 1, 3 or 4\)"),
    (np.zeros((4, 6, 2), np.uint8), r"array of shape \(4, 6, 2\); pass \(height, width\)"),
    (np.zeros((3, 16, 16), np.uint8), r"array of shape \(3, 16, 16\); move the channels last"),
    (np.zeros((2, 4, 6, 3), np.uint8), r"array of shape \(2, 4, 6, 3\)"),
    (np.zeros((4, 6), np.int64), r"array of int64; pass uint8 within 0\.\.255, or float within 0\.\.1"),
    (np.zeros((4, 6), np.uint16), r"array of uint16; pass uint8"),
    (np.zeros((4, 6), np.bool_), r"array of bool; pass uint8"),
    (np.full((4, 6), "a"), r"array of <U1; pass uint8"),
    (np.full((4, 6), np.nan), r"'image' holds NaN or infinity; pass finite values within 0\.\.1"),
    (np.full((4, 6), np.inf), r"'image' holds NaN or infinity"),
    (np.full((4, 6), 255.0), r"float values within 255.0\.\.255.0; scale them to 0\.\.1, or pass uint8"),
    (np.full((4, 6), -0.5), r"float values within -0.5\.\.-0.5; scale them"),
    (Image.new("F", (2, 2), 7.0), r"float values within 7.0\.\.7.0; scale them"),
    (Image.new("I", (2, 2), 70_000), r"integer samples within 70000\.\.70000, beyond 16 bits; convert it to 8"),
    ({"video": "clip.mp4"}, r"'video' is the path 'clip.mp4', where there is no file"),
    ({"video": []}, r"'video' has no frames; pass at least one"),
    ({"video": np.zeros((0, 4, 6, 3), np.uint8)}, r"'video' has no frames"),
    ({"video": np.zeros((4, 6, 3), np.uint8)}, r"'video' is an array of shape \(4, 6, 3\); pass \(frames, height"),
    ({"video": [RED, "gone.png"]}, r"'video'\[1\] is the path 'gone.png', where there is no file"),
    ({"video": [RED, RED.resize((6, 5))]}, r"'video'\[1\] is 6 x 5 pixels but 'video'\[0\] is 6 x 4; resize"),
    ({"text": "a", "fps": 2.0}, r"'fps' is given without a 'video'"),
    ({"image": RED, "timestamps": [0.0]}, r"'timestamps' is given without a 'video'"),
    ({"video": [RED], "fps": 1, "timestamps": [0]}, r"'fps' and 'timestamps' are both given; keep the one"),
    ({"video": [RED], "fps": 0}, r"'fps' is 0.0; pass the frames per second, above 0"),
    ({"video": [RED], "fps": -2}, r"'fps' is -2.0; pass the frames per second"),
    ({"video": [RED], "fps": float("nan")}, r"'fps' is nan; pass a finite number"),
    ({"video": [RED], "fps": "2"}, r"'fps' is '2'; pass a finite number"),
    ({"video": [RED], "fps": True}, r"'fps' is True; pass a finite number"),
    ({"video": [RED], "timestamps": 0.0}, r"'timestamps' is of type float; pass a list of seconds"),
    ({"video": [RED, RED], "timestamps": [0.0]}, r"'timestamps' has 1 times for 2 frames; pass one per frame"),
    ({"video": [RED, RED], "timestamps": [1.0, 0.5]}, r"'timestamps'\[1\] is 0.5 s, below 1.0 s before it"),
    ({"video": [RED], "timestamps": [-1.0]}, r"'timestamps'\[0\] is -1.0 s, below 0.0 s"),
    ({"video": [RED], "timestamps": [float("inf")]}, r"'timestamps'\[0\] is inf; pass a finite number"),
    ({"video": [RED], "timestamps": ["0"]}, r"'timestamps'\[0\] is '0'; pass a finite number"),
]


@pytest.mark.parametrize(("item", "words"), REFUSALS, ids=[words[:60] for _, words in REFUSALS])
def test_a_wrong_input_is_refused_with_its_name_its_value_and_the_fix(item: object, words: str) -> None:
    with pytest.raises(InputError, match=words) as refusal:
        parsed(item)
    assert refusal.value.index is None


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="where there is no file"):
        parsed({"image": tmp_path})


def test_a_path_is_named_when_its_file_is_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no pixels here")
    with pytest.raises(InputError, match=r"'image' \('.*notes\.txt'\) is no image of a known format"):
        parsed({"image": path})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_truncated_file_is_refused_and_not_filled_with_grey(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(InputError, match=r"cannot be decoded|no image of a known format") as refusal:
        parsed({"image": data[: len(data) * 2 // 3]})
    assert refusal.value.__cause__ is not None


def test_a_pil_image_whose_file_was_closed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    RED.save(path)
    with Image.open(path) as image:
        pass
    with pytest.raises(InputError, match="load it before you close its file"):
        parsed(image)


def refuse_to_decode(*_: object) -> None:
    raise AssertionError("the picture was decoded")


@pytest.mark.parametrize("side", [10_001, 30_000])
def test_a_huge_image_is_refused_from_its_header_without_a_warning(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse_to_decode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"'image' .*max_image_pixels = 100000000.*resize it"):
            parsed({"image": png_header(side, side)})


LIMITED: list[tuple[object, dict[str, int], str]] = [
    ("abcd", {"max_text_chars": 3}, r"'text' has 4 characters, above max_text_chars = 3; shorten or split it"),
    (RED, {"max_image_pixels": 23}, r"'image' is 6 x 4 pixels, above max_image_pixels = 23; resize it"),
    (np.asarray(RED), {"max_image_pixels": 23}, r"'image' is 6 x 4 pixels, above max_image_pixels = 23"),
    ({"video": [RED]}, {"max_image_pixels": 23}, r"'video'\[0\] is 6 x 4 pixels, above max_image_pixels = 23"),
    ({"images": [RED] * 3}, {"max_images": 2}, r"'images' has 3 images, above max_images = 2; pass fewer"),
    ({"video": [RED] * 3}, {"max_frames": 2}, r"'video' has 3 frames, above max_frames = 2; sample fewer"),
]


@pytest.mark.parametrize(("item", "limit", "words"), LIMITED, ids=[words[:40] for *_, words in LIMITED])
def test_a_limit_refuses_what_is_above_it_and_accepts_what_is_at_it(
    item: object, limit: dict[str, int], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        parsed(item, **limit)
    parsed(item, **{name: value + 1 for name, value in limit.items()})


def test_counts_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse_to_decode)
    wrong: list[Callable[[], object]] = [
        lambda: parsed({"images": [encoded(RED)] * 3}, max_images=2),
        lambda: parsed({"image": encoded(RED), "video": [RED], "fps": 0}),
        lambda: parsed({"image": encoded(RED), "video": [RED], "timestamps": []}),
    ]
    for call in wrong:
        with pytest.raises(InputError, match=r"max_images|'fps'|'timestamps'"):
            call()


class Shared:
    """An array of another library, which is read through DLPack."""

    def __init__(self, array: Any, refusal: Exception | None = None) -> None:
        self._array, self._refusal = array, refusal

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if self._refusal is not None:
            raise self._refusal
        return self._array.__dlpack__(**options)


@pytest.mark.parametrize("key", ["image", "video"])
def test_arrays_of_other_libraries_are_read_through_dlpack(key: str) -> None:
    array = np.arange(2 * 8 * 6 * 3, dtype=np.uint8).reshape(2, 8, 6, 3)
    value = array if key == "video" else array[0]
    theirs, ours = parse({key: Shared(value)}), parse({key: value})
    for name in ("images", "frames"):
        left, right = ([np.asarray(image) for image in getattr(request, name)] for request in (theirs, ours))
        assert np.array_equal(left, right)
    if key == "image":
        assert np.asarray(parse(Shared(value)).images[0]).shape == (8, 6, 3)


def test_memory_that_cannot_be_copied_to_the_cpu_is_an_error_that_says_so() -> None:
    stuck = Shared(np.zeros((8, 8, 3), np.uint8), BufferError("it lies on a GPU"))
    with pytest.raises(
        InputError, match=r"'image' is a Shared that numpy cannot read \(it lies on a GPU\); copy it to"
    ):
        parse({"image": stuck})
