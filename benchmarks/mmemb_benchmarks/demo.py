"""What `mmemb demo` shows: real digits and questions about them, how each was embedded, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.controls import compare_modes
from mmemb_deploy.evaluation.digitchain import DigitChain, Example
from mmemb_deploy.evaluation.pairs import Judge, Pair, encode_queries
from mmemb_deploy.evaluation.routes import Outcome
from mmemb_deploy.results import Detail

SHOWN = ("match", "name", "chain-2", "chain-3", "chain-4", "chain-5", "text")
SHOWN_MATCHES = 3
MEASURED_PAIRS = 200
DEMO_MODES = ("never", "always", "auto")


@dataclass(frozen=True)
class Showcase:
    """One query, how it was embedded under "auto", and its candidates, best first."""

    example: Example
    detail: Detail
    ranking: list[int]

    @property
    def question(self) -> str:
        """The query in words; every digit that it shows is a square."""
        content = self.example.content
        if "image" in content:
            return f"\N{WHITE SQUARE} {self.example.instruction}"
        words = str(content["text"])
        for place in range(len(content.get("images", []))):
            words = words.replace("abcde"[place], "\N{WHITE SQUARE}")
        return words

    @property
    def found(self) -> bool:
        """Whether the best match is a right one."""
        return self.example.relevant[self.ranking[0]]


@dataclass(frozen=True)
class Demo:
    """The showcases, and the outcomes of never, always and auto on mixed traffic."""

    showcases: list[Showcase]
    modes: dict[str, Outcome]


def run_demo(embedder: Embedder, seed: int) -> Demo:
    """Embed one query of every family, and measure the mixed traffic; all images are from the test split."""
    source = DigitChain("test", seed)
    examples = [example for family in SHOWN for example in source.examples(family, 1)]
    mixed = [Pair.of(example) for example in source.mixed(MEASURED_PAIRS)]
    outcomes = compare_modes(embedder, mixed, seed, timed=MEASURED_PAIRS)
    return Demo(_showcases(embedder, examples), {mode: outcomes[mode] for mode in DEMO_MODES})


def _showcases(embedder: Embedder, examples: Sequence[Example]) -> list[Showcase]:
    pairs = [Pair.of(example) for example in examples]
    judge, encoded = Judge(embedder, pairs), encode_queries(embedder, pairs)
    return [
        Showcase(example, detail, judge.ranking(place, encoded.embeddings_QD[place])[:SHOWN_MATCHES])
        for place, (example, detail) in enumerate(zip(examples, encoded.details, strict=True))
    ]
