"""The 20 subsets of MMEB-train (hub: TIGER-Lab/MMEB-train), the image pairs of VLM2Vec (arXiv 2410.05160).

    FOLDER/<subset>/original-00000-of-00001.parquet     qry, qry_image_path, pos_text, pos_image_path, and mostly
                                                        neg_text, neg_image_path; empty strings where there is nothing
    FOLDER/images/<subset>/Train/...                    once `python unzip_file.py` ran there; paths start at FOLDER

A side's text is one string: the placeholder "<|image_1|>" and a newline where an image belongs, the subset's
instruction, and the words of this row, if any. Public tools pass it to the model whole. Here the instruction becomes
the sample's instruction, as the benchmark's own queries have it (`qry_inst`, `qry_text`), and the rest its text; the
placeholder goes, since the prompt places images itself (WebQA's queries have one and no image). A string that does not
begin with the instruction is all text, and its instruction is empty. Targets that are only text have the bundle's
document instruction. The split `diverse_instruction`, the same rows in other words, is not read.

An answer is equal to another with the same image path and the same text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import OptionError
from mmemb_training.data.files import data_files, how_to_get, parquet_rows
from mmemb_training.samples import Question, Sample, Target

REPOSITORY = "TIGER-Lab/MMEB-train"
PLACEHOLDER = "<|image_1|>"
COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")


@dataclass(frozen=True)
class Subset:
    """How the texts of a subset begin: those of queries, and of targets that are images."""

    query: str
    target: str = ""


_QUESTION = Subset("Represent the given image with the following question:")
SUBSETS = {
    "ImageNet_1K": Subset("Represent the given image for classification"),
    "N24News": Subset("Represent the given news image with the following caption for domain classification:"),
    "HatefulMemes": Subset(
        "Represent the given image for binary classification to determine whether it constitutes hateful speech or not"
    ),
    "VOC2007": Subset("Identify the object shown in the image"),
    "SUN397": Subset("Identify the scene shown in the image"),
    "OK-VQA": _QUESTION,
    "A-OKVQA": _QUESTION,
    "DocVQA": _QUESTION,
    "InfographicsVQA": _QUESTION,
    "ChartQA": _QUESTION,
    "Visual7W": _QUESTION,
    "VisDial": Subset(
        "Represent the given dialogue about an image, which is used for image retrieval:", "Represent the given image"
    ),
    "CIRR": Subset(
        "Given an image, find a similar everyday image with the described changes:", "Represent the given image."
    ),
    "VisualNews_t2i": Subset("Retrieve an image of this news caption.", "Represent the given image."),
    "VisualNews_i2t": Subset("Find a caption for the news in the given photo."),
    "MSCOCO_t2i": Subset("Find me an everyday image that matches the given caption:", "Represent the given image."),
    "MSCOCO_i2t": Subset("Find an image caption describing the given everyday image."),
    "NIGHTS": Subset("Find a day-to-day image that looks similar to the provided image.", "Represent the given image."),
    "WebQA": Subset(
        "Find a Wikipedia image that answers this question:",
        "Represent the given Wikipedia image with related text information:",
    ),
    "MSCOCO": Subset(
        "Select the portion of the image that isolates the object labeled as",
        "Represent the given cropped image of the object",
    ),
}


@dataclass(frozen=True)
class _Side:
    """One side of a row: its text without the placeholder, and its image's path, empty where there is none."""

    text: str
    image: str

    @classmethod
    def of(cls, text: str | None, image: str | None) -> _Side:
        return cls((text or "").replace(PLACEHOLDER, "").strip(), image or "")

    def without(self, instruction: str) -> tuple[str, str]:
        """Return the instruction that the text begins with, or none, and the words that follow it."""
        if not self.text.startswith(instruction):
            return "", self.text
        return instruction, self.text.removeprefix(instruction).strip()


def read_mmeb(subset: str, folder: Path) -> Iterator[Sample]:
    """Read a subset, one of SUBSETS; rows without a query or without a target are left out, as public tools do.

    Raises OptionError, with the command that brings it, for a file or an image that is missing.
    """
    files = data_files(folder / subset, "original-*.parquet", how_to_get(REPOSITORY, folder))
    words = SUBSETS[subset]
    for number, row in enumerate(parquet_rows(files, COLUMNS, NEGATIVE_COLUMNS)):
        query = _Side.of(row["qry"], row["qry_image_path"])
        instruction, text = query.without(words.query)
        content = _content(text, query.image, folder)
        target = _target(_Side.of(row["pos_text"], row["pos_image_path"]), words.target, folder)
        if not content or target is None:
            continue
        negative = _target(_Side.of(row["neg_text"], row["neg_image_path"]), words.target, folder)
        (wanted,) = target.labels
        yield Sample(
            question=Question(
                key=f"mmeb/{subset}/{number}", task=f"mmeb/{subset}", content=content, instruction=instruction
            ),
            wanted=wanted,
            target=target,
            negatives=() if negative is None else (negative,),
        )


def _target(side: _Side, instruction: str, folder: Path) -> Target | None:
    """Return a target, None where the row has none."""
    if not side.image:
        return Target(content={"text": side.text}, labels=frozenset({side.text})) if side.text else None
    # VisDial's negatives are images without a text: they are read as what they compete with is.
    found, text = side.without(instruction) if side.text else (instruction, "")
    label = f"{side.image}\n{text}" if text else side.image
    return Target(content=_content(text, side.image, folder), labels=frozenset({label}), instruction=found)


def _content(text: str, image: str, folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = {"text": text} if text else {}
    if image:
        path = folder / image
        if not path.is_file():
            raise OptionError(f"{path} is missing; unpack the images with: cd {folder} && python unzip_file.py")
        content["image"] = str(path)
    return content
