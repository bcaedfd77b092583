"""Pages of a PDF equal those that pypdfium2 renders at the same scale; what is no whole PDF is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import mmemb_deploy
from mmemb_deploy import Embedder, RemoteReasoner
from mmemb_deploy.errors import InputError, MissingExtraError
from mmemb_deploy.inputs import media
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.media import duration, page_count
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.pdf import page_pixels, page_scale
from mmemb_deploy.inputs.preprocess import QWEN3_VL, VisionSpec
from mmemb_deploy.reasoners import remote

Pixels = NDArray[np.uint8]
MakePdf = Callable[..., Path]
SMALL = replace(QWEN3_VL, max_pixels=512 * 32 * 32)
SCRIPT = replace(SMALL, resize="qwen-vl-utils", min_pixels=4 * 32 * 32, video_max_pixels=7680 * 32 * 32)


@pytest.fixture
def make_pdf(tmp_path: Path) -> MakePdf:
    """Write a PDF of numbered pages."""

    def make(pages: int = 3, size: tuple[int, int] = (300, 420), name: str = "paper.pdf") -> Path:
        images = [Image.new("RGB", size, (255, 255 - number % 100, 230)) for number in range(pages)]
        for number, image in enumerate(images, start=1):
            ImageDraw.Draw(image).text((20, 20), f"page {number}", fill="black")
        images[0].save(tmp_path / name, "PDF", save_all=True, append_images=images[1:])
        return tmp_path / name

    return make


def blank_pages(count: int) -> bytes:
    document = pypdfium2.PdfDocument.new()
    for _ in range(count):
        document.new_page(200, 100)
    buffer = io.BytesIO()
    document.save(buffer)
    document.close()
    return buffer.getvalue()


def written(*objects: str, trailer: str = "/Root 1 0 R") -> bytes:
    """Return a PDF of these objects, the first its catalog."""
    body, places = "%PDF-1.7\n", list[int]()
    for number, each in enumerate(objects, start=1):
        places.append(len(body))
        body += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    start = len(body)
    body += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    return f"{body}trailer\n<< /Size {len(objects) + 1} {trailer} >>\nstartxref\n{start}\n%%EOF\n".encode("latin-1")


CATALOG = "<< /Type /Catalog /Pages 2 0 R >>"


def rendered(path: Path, number: int, pages: int, spec: VisionSpec) -> Pixels:
    """Return a page as pypdfium2 renders it at the scale of a budget."""
    with pypdfium2.PdfDocument(path) as document:
        page: Any = document[number - 1]
        scale = page_scale(page.get_width(), page.get_height(), page_pixels(pages, spec))
        return np.asarray(page.render(scale=scale).to_pil().convert("RGB"))


def arrays(images: tuple[Image.Image, ...]) -> list[Pixels]:
    return [np.asarray(image) for image in images]


# ---- pages


@pytest.mark.parametrize("spec", [QWEN3_VL, SMALL, SCRIPT], ids=["Qwen3-VL", "small", "script"])
@pytest.mark.parametrize("size", [(300, 420), (420, 300), (51, 977)])
def test_pages_equal_pypdfium2_s_own_rendering(make_pdf: MakePdf, spec: VisionSpec, size: tuple[int, int]) -> None:
    path = make_pdf(size=size)
    for given in (path, str(path), path.read_bytes()):
        request = parse({"document": given}, Limits(), spec)
        for number, page in enumerate(arrays(request.images), start=1):
            np.testing.assert_array_equal(page, rendered(path, number, 3, spec))


def test_a_page_has_as_many_pixels_as_the_model_reads_and_no_more(make_pdf: MakePdf) -> None:
    path = make_pdf(size=(595, 842))
    (page,) = parse({"document": path, "pages": [1]}, Limits(), SMALL).images
    assert 0.99 * SMALL.max_pixels < page.width * page.height <= SMALL.max_pixels + page.width + page.height
    assert page.width / page.height == pytest.approx(595 / 842, rel=0.01)
    (fine,) = parse({"document": path, "pages": [1]}, Limits(), QWEN3_VL).images
    assert fine.size == (1653, 2339), "200 dots an inch, although 16 million pixels may be read"


def test_pages_of_one_input_share_the_pixels_of_a_video() -> None:
    assert page_pixels(1, SCRIPT) == SCRIPT.max_pixels
    assert page_pixels(64, SCRIPT) == pytest.approx(SCRIPT.video_max_pixels / 64)
    assert page_pixels(64, QWEN3_VL) == pytest.approx(QWEN3_VL.video_max_pixels / 2 / 64)
    assert page_pixels(64, replace(SMALL, min_pixels=SMALL.max_pixels)) == SMALL.max_pixels


def test_pages_come_in_the_order_in_which_they_are_named(make_pdf: MakePdf) -> None:
    path = make_pdf(5)
    request = parse(
        {"text": "a", "image": Image.new("RGB", (8, 8)), "document": path, "pages": [4, 2]}, Limits(), SMALL
    )
    assert request.pages == (4, 2)
    assert request.images[0].size == (8, 8)
    for page, number in zip(arrays(request.images[1:]), (4, 2), strict=True):
        np.testing.assert_array_equal(page, rendered(path, number, 2, SMALL))
    assert parse({"document": path}, Limits(), SMALL).pages == (1, 2, 3, 4, 5)


def test_what_is_filled_into_a_form_is_drawn() -> None:
    def form(value: str) -> Pixels:
        document = written(
            "<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] /DA (/Helv 24 Tf 0 g) /NeedAppearances true "
            "/DR << /Font << /Helv << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >> >>",
            "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Annots [4 0 R] >>",
            f"<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /V ({value}) /DA (/Helv 24 Tf 0 g) "
            "/Rect [20 20 180 80] /P 3 0 R >>",
        )
        return np.asarray(parse({"document": document}, Limits(), SMALL).images[0])

    assert (form("31415") < 100).any()
    assert not np.array_equal(form("31415"), form("27182"))


# ---- counting


def test_a_document_s_pages_are_listed_as_inputs(make_pdf: MakePdf) -> None:
    path = make_pdf(3)
    assert page_count(path) == 3
    assert mmemb_deploy.pages(path) == [{"document": path, "pages": [number]} for number in (1, 2, 3)]
    content = path.read_bytes()
    assert mmemb_deploy.pages(content)[2] == {"document": content, "pages": [3]}


def test_a_document_of_ten_thousand_pages_is_read_in_parts() -> None:
    document = blank_pages(10_000)
    assert parse({"document": document, "pages": [10_000, 1]}, Limits(), SMALL).pages == (10_000, 1)
    with pytest.raises(InputError, match=r"^'document' has 10000 pages, above max_images = 64; name those .* 'pages'"):
        parse({"document": document})
    with pytest.raises(InputError, match="'document' has 10000 pages, above max_pages = 9999; split it"):
        parse({"document": document, "pages": [1]}, Limits(max_pages=9999))


def test_pages_and_images_count_together(make_pdf: MakePdf) -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(InputError, match=r"'document' .* has 3 pages, above max_images = 4"):
        parse({"images": [image, image], "document": make_pdf(3)}, Limits(max_images=4))
    with pytest.raises(InputError, match="'pages' has 3 pages, above max_images = 4; name fewer"):
        parse({"images": [image, image], "document": make_pdf(3), "pages": [1, 2, 3]}, Limits(max_images=4))


# ---- what is refused


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"", "is empty; pass a file that holds something"),
        (b"no pdf", "is no whole PDF; pass one that a viewer opens"),
        (
            written(
                CATALOG,
                "<< /Type /Pages /Kids [] /Count 0 >>",
                "<< /Filter /Standard /V 1 /R 2 /P -4 /O <" + "00" * 32 + "> /U <" + "11" * 32 + "> >>",
                trailer="/Root 1 0 R /Encrypt 3 0 R /ID [<00> <00>]",
            ),
            "is encrypted; remove its password first",
        ),
        (written(CATALOG, "<< /Type /Pages /Kids [] /Count 0 >>"), "has no pages; pass a PDF that shows something"),
        (
            written(CATALOG, "<< /Type /Pages /Kids [3 0 R] /Count 1 >>", "null"),
            "has a page 1 that cannot be rendered .*; leave it out|has no pages",
        ),
    ],
    ids=["empty", "none", "encrypted", "no pages", "broken page"],
)
def test_a_document_that_shows_nothing_is_refused(document: bytes, words: str) -> None:
    with pytest.raises(InputError, match=f"^'document' ({words})"):
        parse({"document": document})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pages": [4]}, "has 3 pages, and 'pages' names page 4; name pages within 1..3"),
        ({"pages": [0]}, r"'pages'\[0\] is 0; pass whole numbers, counted from 1"),
        ({"pages": [True]}, r"'pages'\[0\] is True; pass whole numbers"),
        ({"pages": [1.0]}, r"'pages'\[0\] is 1.0; pass whole numbers"),
        ({"pages": []}, "'pages' is empty; name at least one page, or leave it out for all"),
        ({"pages": 1}, "'pages' is of type int; pass a list of page numbers"),
    ],
)
def test_what_is_asked_of_a_document_is_checked(make_pdf: MakePdf, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse({"document": make_pdf()} | keys)


def test_a_document_is_a_path_or_bytes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'document' is of type int; pass the path of a PDF file, or its bytes"):
        parse({"document": 3})
    with pytest.raises(InputError, match=r"'document' is the path '.*absent.pdf', where there is no file"):
        parse({"document": tmp_path / "absent.pdf"})
    with pytest.raises(InputError, match=r"'document' is the URL 'https://example.org/a.pdf'; download it first"):
        parse({"document": "https://example.org/a.pdf"})
    with pytest.raises(InputError, match="'pages' is given without a 'document'"):
        parse({"text": "a", "pages": [1]})


@pytest.mark.parametrize(("key", "package"), [("document", "pypdfium2"), ("video", "av")])
def test_a_missing_package_is_named_with_its_extra(key: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(MissingExtraError, match=rf"'{package}', which is not installed: .*mmemb-deploy\[media\]"):
        parse({key: b"anything"})
    with pytest.raises(MissingExtraError, match=r"mmemb-deploy\[media\]"):
        {"document": page_count, "video": duration}[key](b"anything")


# ---- embedding


def test_each_page_becomes_a_vector_or_all_become_one(make_pdf: MakePdf) -> None:
    embedder, path = Embedder.load(), make_pdf(3)
    apart = embedder.encode_document(mmemb_deploy.pages(path))
    assert apart.shape == (3, embedder.dim)
    result = embedder.encode_detailed([{"document": path}, *mmemb_deploy.pages(path), "a text"])
    assert [detail.pages for detail in result.details if detail] == [(1, 2, 3), (1,), (2,), (3,), ()]
    images = parse({"document": path}, Limits(), embedder.encoder.vision).images
    together = embedder.encode_document([{"document": path}, {"images": list(images)}])
    np.testing.assert_allclose(together[0], together[1], atol=1e-6)


def test_a_reasoner_sees_the_pages_that_the_bundle_sees(
    make_pdf: MakePdf, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.reply = lambda body: endpoint.answer(body, {"content": "ab"})
    embedder = Embedder.load(reasoner=RemoteReasoner(endpoint.url, model="tiny"))
    path = make_pdf(2)
    for held in (remote.HELD_BYTES, 0):  # kept, or rendered again when it is sent
        monkeypatch.setattr(remote, "HELD_BYTES", held)
        embedder.encode([{"document": path, "text": "a"}], reasoning="always")
    assert len(endpoint.received) == 2
    for body in endpoint.received:
        shown = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in shown]
        for number, picture in enumerate(pictures, start=1):
            np.testing.assert_array_equal(picture, rendered(path, number, 2, embedder.encoder.vision))
        assert len(pictures) == 2
