"""What the page searches: documents with their vectors, and queries to try.

The small bundle comes with a gallery of handwritten digits and their names. Any other bundle searches a folder of the
user's own pictures, where one is given.

Axes: N documents, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.digitchain import MATCH_INSTRUCTION, NAMES, DigitChain
from mmemb_deploy.inputs.formats import SUFFIXES, kind_of
from mmemb_deploy.inputs.images import data_uri, load_image
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.preparer import Preparer

DIGITS = "nano"  # the model whose world is digits
DRAWINGS = 3  # pictures of every digit
SEED = 3
MISREAD = 235  # a three that one look takes for an eight, and the gate for easy
MOST_PICTURES = 400
THUMBNAIL = 112  # pixels of its longer side


@dataclass(frozen=True)
class Document:
    """One document as the page shows it: its name, and its picture as a data URI where it is one."""

    name: str
    image: str | None = None


@dataclass(frozen=True)
class Sample:
    """A query to click: what its button is called, and what it asks."""

    name: str
    text: str = ""
    images: tuple[str, ...] = ()  # data URIs
    instruction: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Documents and their vectors (N, D), L2-normalised; queries to try; what the user should know."""

    documents: Sequence[Document]
    vectors_ND: Floats
    samples: Sequence[Sample] = ()
    note: str | None = None
    ink: bool = False  # its pictures are light strokes on black, and may be shown as ink on paper

    def nearest(self, embedding_D: Floats, count: int) -> list[tuple[int, float]]:
        """Return the indices and cosines of the nearest documents, nearest first."""
        cosines_N = self.vectors_ND @ embedding_D
        return [(int(index), float(cosines_N[index])) for index in np.argsort(-cosines_N, kind="stable")[:count]]


EncodeDocument = Callable[[Sequence[Any]], Floats]


def open_gallery(preparer: Preparer, encode_document: EncodeDocument, folder: Path | None = None) -> Gallery:
    """Embed the documents of the gallery that belongs to a bundle, or of a folder of pictures.

    `encode_document` is that of an Embedder of the preparer's bundle, wherever it is.
    Raises OptionError for a folder that has no pictures or too many, InputError for a picture that cannot be read.
    """
    if folder is not None:
        return _of_folder(preparer, encode_document, folder)
    if preparer.manifest.model.name == DIGITS:
        return _of_digits(encode_document)
    nothing = np.empty((0, preparer.dim), np.float32)
    return Gallery((), nothing, note="There is no gallery to search: start the server with a folder of pictures.")


def _of_folder(preparer: Preparer, encode_document: EncodeDocument, folder: Path) -> Gallery:
    if not folder.is_dir():
        raise OptionError(f"gallery is {folder}: it is no folder; pass one that holds pictures")
    paths = sorted(path for path in folder.iterdir() if kind_of(path) == "image")
    if not 1 <= len(paths) <= MOST_PICTURES:
        raise OptionError(
            f"gallery is {folder}, with {len(paths)} pictures ({', '.join(SUFFIXES['image'])}): "
            f"pass 1 to {MOST_PICTURES}"
        )
    most = preparer.manifest.limits.max_image_pixels
    documents = [Document(path.stem, _thumbnail(load_image(path, "'gallery'", most))) for path in paths]
    return Gallery(documents, encode_document([{"image": path} for path in paths]))


def _of_digits(encode_document: EncodeDocument) -> Gallery:
    """Every digit's name and, where scikit-learn brings them, some drawings of each that training never saw."""
    documents = [Document(name) for name in NAMES]
    contents: list[dict[str, Any]] = [{"text": name} for name in NAMES]
    words = [Sample(text, text) for text in ("seven", "three plus four", "five plus six times two")]
    if find_spec("sklearn") is None:
        note = "Pictures of digits are missing: they come with scikit-learn (pip install scikit-learn)."
        return Gallery(documents, encode_document(contents), words, note)
    digits = DigitChain("test", SEED)
    shown = [(value, int(digits.drawings.of_value(value)[nth])) for nth in range(DRAWINGS) for value in range(10)]
    for value, drawing in shown:
        pixels = digits.render(drawing)
        documents.append(Document(f"a drawn {NAMES[value]}", _png(pixels)))
        contents.append({"image": pixels})
    samples = [*words, *_drawn_samples(digits, shown)]
    return Gallery(documents, encode_document(contents), samples, ink=True)


def _drawn_samples(digits: DigitChain, shown: Sequence[tuple[int, int]]) -> list[Sample]:
    chains = [digits.examples(family, 1)[0].content for family in ("chain-2", "chain-3")]
    (name,) = (example.content for example in digits.examples("name", 1))
    again = {"image": digits.render(shown[2][1])}
    return [
        _drawn("a drawn digit", name),
        _drawn("a drawing that is easily misread", {"image": DigitChain("test", SEED).render(MISREAD)}),
        *[_drawn(f"drawn digits: {chain['text']}", chain) for chain in chains],
        _drawn("the same drawing", again, MATCH_INSTRUCTION),
    ]


def _drawn(name: str, content: Mapping[str, Any], instruction: str | None = None) -> Sample:
    images = content.get("images") or [content["image"]]
    return Sample(name, content.get("text", ""), tuple(map(_png, images)), instruction)


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(image)


def _png(pixels: Any) -> str:
    """Return uint8 pixels, grey or RGB, as a data URI that keeps every value."""
    return data_uri(Image.fromarray(pixels))
