"""The pages of a PDF as pictures, by pypdfium2; runs in the process of `decoder_process`.

A page is rendered in its own aspect to as many pixels as the model reads of an image, at DPI at most. Of several pages
in one input, all together have the pixels that the model reads of a video.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pypdfium2
from pypdfium2 import raw

from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.preprocess import Pixels, VisionSpec

DPI = 200  # at which print is read; finer shows no more of it
POINTS = 72  # of a PDF, in an inch
REASONS = {
    raw.FPDF_ERR_PASSWORD: "is encrypted; remove its password first, as `qpdf --decrypt` does",
    raw.FPDF_ERR_SECURITY: "is encrypted in a way that is not known; remove the encryption first",
    raw.FPDF_ERR_FORMAT: "is no whole PDF; pass one that a viewer opens",
}


def page_count(source: str | bytes, limits: Limits) -> int:
    """Return how many pages a document has.

    Raises InputError, whose message goes on after the file's name, for a document that is encrypted, broken, empty, or
    above a limit.
    """
    with _opened(source, limits) as document:
        return len(document)


def render_pages(
    source: str | bytes, numbers: Sequence[int] | None, most: int, limits: Limits, vision: VisionSpec
) -> tuple[list[Pixels], list[int]]:
    """Return pages as uint8 (H, W, 3), each of its own size, and their numbers.

    `numbers` are counted from 1, None for all; there are `most` at most. Raises InputError as `page_count` does, and
    for a page that is not there or cannot be rendered.
    """
    with _opened(source, limits) as document:
        count = len(document)
        if numbers is None:
            if count > most:
                raise InputError(
                    f"has {count} pages, above max_images = {limits.max_images}; name those to embed as 'pages', or "
                    "give each page an input of its own, as mmemb_deploy.pages lists them"
                )
            numbers = range(1, count + 1)
        for number in numbers:
            if number > count:
                raise InputError(f"has {count} pages, and 'pages' names page {number}; name pages within 1..{count}")
        if document.get_formtype() != raw.FORMTYPE_NONE:
            document.init_forms()  # or what is filled into its fields is not drawn
        pixels = page_pixels(len(numbers), vision)
        return [_rendered(document, number, pixels) for number in numbers], list(numbers)


def page_pixels(pages: int, vision: VisionSpec) -> float:
    """Return how many pixels each page of an input has."""
    video: float = vision.video_max_pixels  # by qwen-vl-utils it bounds one frame of each temporal patch
    if vision.resize == "transformers":
        video /= vision.temporal_patch_size
    return max(vision.min_pixels, min(vision.max_pixels, video / pages))


def page_scale(width: float, height: float, pixels: float) -> float:
    """Return the pixels for a point at which a page of this size, in points, has `pixels` pixels at most."""
    return min(math.sqrt(pixels / (width * height)), DPI / POINTS)


@contextmanager
def _opened(source: str | bytes, limits: Limits) -> Generator[pypdfium2.PdfDocument]:
    try:
        document = pypdfium2.PdfDocument(source)
    except pypdfium2.PdfiumError as error:
        raise InputError(_reason(source)) from error
    with document:
        count = len(document)
        if count > limits.max_pages:
            raise InputError(f"has {count} pages, above max_pages = {limits.max_pages}; split it")
        yield document


def _reason(source: str | bytes) -> str:
    """Return why a document does not open: pypdfium2 gives the reason of an earlier one where there are no pages."""
    if isinstance(source, bytes):
        document = raw.FPDF_LoadMemDocument64(source, len(source), None)
    else:
        document = raw.FPDF_LoadDocument(os.fsencode(source), None)
    if document:
        raw.FPDF_CloseDocument(document)
        return "has no pages; pass a PDF that shows something"
    return REASONS.get(raw.FPDF_GetLastError(), "cannot be opened; pass a whole PDF")


def _rendered(document: pypdfium2.PdfDocument, number: int, pixels: float) -> Pixels:
    try:
        page: Any = document[number - 1]
        width, height = page.get_size()
        if not (0 < width < math.inf and 0 < height < math.inf):
            raise InputError(f"has a page {number} of {width:g} x {height:g} points, which shows nothing; leave it out")
        bitmap = page.render(scale=page_scale(width, height, pixels))
        image = np.asarray(bitmap.to_pil().convert("RGB"))
        bitmap.close()
        page.close()
    except (pypdfium2.PdfiumError, ValueError) as error:
        raise InputError(f"has a page {number} that cannot be rendered ({error}); leave it out") from error
    return image
