"""What a benchmark sends, and an embedder that does not remember it.

Drawn inputs differ from each other, so that no cache makes a repeat look fast. Their sizes follow the bundle: pictures
have the pixels that its vision tower takes at most, up to LARGEST_SIDE squared.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError, check_known
from mmemb_deploy.evaluation.digitchain import DigitChain
from mmemb_deploy.evaluation.pairs import Pair, encode_queries, read_pairs
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.rows import Row, RowEncoder
from mmemb_deploy.jobs.source import read_source
from mmemb_deploy.preparer import row_encoder

LARGEST_SIDE = 1024  # pixels
PAGE_SIDE = 512  # pixels that a page is drawn at, at least, lest there be no space for a line
PAGE = 1 / math.sqrt(2)  # width over height, as of A4
FRAMES, FPS = 4, 2.0
IMAGES = 3
SHORT, LONG = 16, 256  # tokens of a text
TRIES = 16  # draws of a text
LETTERS = list("abcdefghijklmnopqrstuvwxyz      ")


@dataclass(frozen=True)
class Maker:
    """Makes inputs of `Embedder.encode` for one bundle."""

    encoder: RowEncoder
    manifest: Manifest

    def row(self, content: object, instruction: str | None = None) -> Row:
        """Preprocess an input, by default with the bundle's own instruction."""
        asked = self.manifest.prompt.asked(instruction)
        return self.encoder.row(parse(content, self.manifest.limits, self.encoder.vision), asked)

    def text(self, tokens: int, rng: np.random.Generator) -> str:
        """Return random letters, the first no space, of exactly so many tokens.

        Raises OptionError where the tokenizer makes no such text of TRIES draws.
        """

        def count(length: int) -> int:
            return len(self.encoder.prompt.tokenize(letters[:length]))

        for _ in range(TRIES):
            letters = str(rng.choice(LETTERS[:26]))
            while count(len(letters)) < tokens:
                letters += "".join(rng.choice(LETTERS, size=4 * tokens))
            # where the tokens reach the number; a letter more adds at most one, or else the next draw is tried
            length = bisect_left(range(len(letters)), tokens, key=count)
            if count(length) == tokens:
                return letters[:length]
        raise OptionError(f"tokens is {tokens}: no random letters are cut into so many by this bundle's tokenizer")

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

    def _size(self, ratio: float, min_side: int) -> tuple[int, int]:
        pixels = max(min(self.manifest.vision.max_pixels, LARGEST_SIDE**2), min_side**2)
        return round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))


KINDS: dict[str, Callable[[Maker, np.random.Generator], object]] = {
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


@dataclass(frozen=True)
class Workload:
    """Queries, and whether their candidates say which embedding is a right one."""

    pairs: Sequence[Pair]
    judged: bool
    source: str

    @classmethod
    def of(
        cls,
        embedder: Embedder,
        *,
        requests: Path | None = None,
        pairs: Path | None = None,
        kind: str | None = None,
        queries: int,
        seed: int,
    ) -> Workload:
        """Read `requests` as `mmemb embed` does, or `pairs` as `mmemb calibrate` does, or draw inputs of a `kind`.

        Without any of them DigitChain's mixed traffic is drawn, over digits that no training saw. Raises OptionError
        for more than one of them, and at a malformed line.
        """
        given = {"--requests": requests, "--pairs": pairs, "--workload": kind}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise OptionError(f"{' and '.join(named)} each say what to embed: pass one of them")
        if pairs is not None:
            return cls(read_pairs(pairs), True, pairs.name)
        if requests is not None:
            return cls(_unjudged(read_source(requests, limits=embedder.manifest.limits).inputs()), False, requests.name)
        if kind is not None:
            check_known("workload", kind, KINDS)
            maker, rng = Maker(embedder.encoder, embedder.manifest), np.random.default_rng(seed)
            return cls(_unjudged(KINDS[kind](maker, rng) for _ in range(queries)), False, f"{kind}, seed {seed}")
        drawn = [Pair.of(example) for example in DigitChain("test", seed).mixed(queries)]
        return cls(drawn, True, f"DigitChain, mixed traffic of the test split, seed {seed}")


def _unjudged(inputs: Iterable[Any]) -> list[Pair]:
    return [Pair(query=content, candidates=[], relevant=[]) for content in inputs]


def load_uncached(bundle: Path | None, backend: str, threads: int | None, device: int = 0) -> tuple[Bundle, Engine]:
    """Open a bundle, the embedded one for None, so that no image's features are remembered from call to call.

    A benchmark repeats its requests, and traffic does not.
    """
    opened = Bundle.open(NANO if bundle is None else bundle)
    manifest = opened.manifest
    batch = manifest.batch.model_copy(update={"vision_bytes": 0})
    uncached = Bundle(opened.folder, manifest.model_copy(update={"batch": batch}))
    return uncached, choose_backend(backend, uncached, threads, device)[0].load(uncached)


def assemble(bundle: Bundle, engine: Engine) -> Embedder:
    """Return an embedder over an engine that is loaded."""
    return Embedder(bundle.manifest, row_encoder(bundle), engine)


def threshold_of_rate(embedder: Embedder, workload: Workload, rate: float | None) -> float | None:
    """Return the gate's threshold at which this share of the workload reasons; None, the bundle's own, for None.

    It makes the weights of a model that was never trained behave as traffic does. Raises OptionError for a bundle that
    does not reason.
    """
    if not embedder.reasons:
        raise OptionError(f"{embedder.manifest.model.name} does not reason: it has no second route to measure")
    if rate is None:
        return None
    scores = [detail.gate_score for detail in encode_queries(embedder, workload.pairs, reasoning="never").details]
    return float(np.quantile(scores, 1 - rate, method="higher"))


def prompt_tokens(embedder: Embedder, workload: Workload) -> list[int]:
    """Return the tokens of every prompt, without those of its prefix."""
    maker = Maker(embedder.encoder, embedder.manifest)
    rows = (maker.row(pair.query, pair.instruction) for pair in workload.pairs)
    return [row.length - row.prefix for row in rows]
