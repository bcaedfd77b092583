"""The inputs of benchmarks, by name, drawn anew for every round: no cache makes a repeat look fast.

Sizes follow the bundle: pictures have the pixels that its vision tower takes at most, up to LARGEST_SIDE squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.rows import Row, RowEncoder

LARGEST_SIDE = 1024  # pixels
PAGE_SIDE = 512  # pixels that a page is drawn at, at least, lest there be no room for a line
PAGE = 1 / math.sqrt(2)  # width over height, as of A4
FRAMES, FPS = 4, 2.0
IMAGES = 3
SHORT, LONG = 16, 256  # tokens of a text
LETTERS = list("abcdefghijklmnopqrstuvwxyz      ")


@dataclass(frozen=True)
class Maker:
    """Makes inputs of `Embedder.encode` for one bundle."""

    encoder: RowEncoder
    manifest: Manifest

    def row(self, content: object) -> Row:
        """Preprocess an input, with the bundle's own instruction."""
        return self.encoder.row(parse(content, self.manifest.limits), self.manifest.prompt.query_instruction)

    def text(self, tokens: int, rng: np.random.Generator) -> str:
        """Return random letters of about so many tokens."""
        prompt = self.encoder.prompt
        return prompt.decode(prompt.tokenize("".join(rng.choice(LETTERS, size=4 * tokens)))[:tokens])

    def image(self, rng: np.random.Generator, ratio: float = 1.0) -> Image.Image:
        """Return a picture of coarse shapes and fine noise, its width `ratio` times its height."""
        width, height = self._size(ratio, 0)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((width, height))
        noisy = np.asarray(coarse, np.int16) + rng.integers(-16, 17, (height, width, 3), np.int16)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    def page(self, rng: np.random.Generator) -> Image.Image:
        """Return a page of printed lines."""
        width, height = self._size(PAGE, PAGE_SIDE)
        page = Image.new("RGB", (width, height), "white")
        draw, line = ImageDraw.Draw(page), max(10, height // 48)
        for top in range(line, height - line, line + line // 3):
            words = "".join(rng.choice(LETTERS, size=max(1, 2 * width // line)))
            draw.text((line, top), words, fill="black", font_size=line)
        return page

    def _size(self, ratio: float, least: int) -> tuple[int, int]:
        pixels = max(min(self.manifest.vision.max_pixels, LARGEST_SIDE**2), least**2)
        return round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))


WORKLOADS: dict[str, Callable[[Maker, np.random.Generator], object]] = {
    "short text": lambda maker, rng: maker.text(SHORT, rng),
    "long text": lambda maker, rng: maker.text(LONG, rng),
    "image": lambda maker, rng: maker.image(rng),
    "images and text": lambda maker, rng: {
        "images": [maker.image(rng) for _ in range(IMAGES)],
        "text": maker.text(SHORT, rng),
    },
    "document page": lambda maker, rng: maker.page(rng),
    "video": lambda maker, rng: {"video": [maker.image(rng, 4 / 3) for _ in range(FRAMES)], "fps": FPS},
}
