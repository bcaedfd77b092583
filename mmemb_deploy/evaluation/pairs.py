"""Retrieval quality of a bundle on pairs, and the time of a query alone: what calibration and benchmarks measure with.

Axes: Q pairs, D embedding size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.digitchain import FAMILIES, DigitChain, Example
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.results import Detail

Bools = NDArray[np.bool_]

CALIBRATION_SEED = 0
CALIBRATION_QUERIES = 400  # of each DigitChain family


class Pair(BaseModel):
    """A query, its candidates, and which of them are right; inputs are those of `Embedder.encode`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    query: Any
    candidates: list[Any]
    relevant: list[bool]
    instruction: str | None = None
    group: str = "all"  # pairs whose quality is watched together

    @classmethod
    def of(cls, example: Example) -> Pair:
        """Read a DigitChain example as a pair of its family."""
        return cls(
            query=example.content,
            candidates=[candidate.content for candidate in example.candidates],
            relevant=list(example.relevant),
            instruction=example.instruction,
            group=example.family,
        )


def held_out_pairs(data: str) -> list[Pair]:
    """Return the pairs to calibrate on: "digitchain", or a file that `read_pairs` reads."""
    if data != "digitchain":
        return read_pairs(Path(data))
    source = DigitChain("calibration", CALIBRATION_SEED)
    return [Pair.of(example) for family in FAMILIES for example in source.examples(family, CALIBRATION_QUERIES)]


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs from JSON lines; raises OptionError that names the line of a malformed one."""
    if not path.is_file():
        raise OptionError(f"{path} is not a file: pass JSON lines of query, candidates, relevant")
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            pair = Pair.model_validate(json.loads(line))
        except (json.JSONDecodeError, ValidationError) as error:
            raise OptionError(f"{path}, line {number}: {error}") from error
        if len(pair.relevant) != len(pair.candidates) or not any(pair.relevant):
            raise OptionError(
                f"{path}, line {number}: relevant needs one value per candidate, at least one of them true"
            )
        pairs.append(pair)
    if not pairs:
        raise OptionError(f"{path} holds no pair")
    return pairs


@dataclass(frozen=True)
class Encoded:
    """The queries of some pairs, embedded: vectors (Q, D) and how each came about."""

    embeddings_QD: Floats
    details: list[Detail]


def encode_queries(embedder: Embedder, pairs: Sequence[Pair], **options: Unpack[EncodeOptions]) -> Encoded:
    """Embed the queries of pairs, each with its own instruction."""
    embeddings_QD = np.empty((len(pairs), embedder.dim), np.float32)
    details: dict[int, Detail] = {}
    rationales = options.pop("rationales", None)
    for instruction in {pair.instruction for pair in pairs}:
        chosen = [index for index, pair in enumerate(pairs) if pair.instruction == instruction]
        options["instruction"] = instruction
        options["rationales"] = None if rationales is None else [rationales[index] for index in chosen]
        result = embedder.encode_detailed([pairs[index].query for index in chosen], **options)
        embeddings_QD[chosen] = result.embeddings
        details |= {index: detail for index, detail in zip(chosen, result.details, strict=True) if detail is not None}
    return Encoded(embeddings_QD, [details[index] for index in range(len(pairs))])


def encode_alone(
    embedder: Embedder, pairs: Sequence[Pair], settings: Mapping[str, EncodeOptions], *, warm_up: int = 1
) -> Iterator[tuple[str, int, Encoded, float]]:
    """Embed the query of every pair alone under every setting, the settings in turns of rotating order.

    Yields the setting's name, the pair's index, what came of it, and the seconds it took, after `warm_up` pairs that do
    not count. A setting's `rationales` hold one for every pair.
    """
    names = list(settings)
    for turn, index in enumerate([*range(min(warm_up, len(pairs))), *range(len(pairs))]):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            options = settings[name].copy()
            if (rationales := options.get("rationales")) is not None:
                options["rationales"] = [rationales[index]]
            began = time.perf_counter()
            encoded = encode_queries(embedder, [pairs[index]], **options)
            seconds = time.perf_counter() - began
            if turn >= warm_up:
                yield name, index, encoded, seconds


class Judge:
    """Embeds the candidates of pairs once, then judges any embeddings of their queries."""

    def __init__(self, embedder: Embedder, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        texts = {text for pair in pairs for text in map(_words, pair.candidates) if text is not None}
        known = dict(zip(sorted(texts), _documents(embedder, sorted(texts)), strict=True))
        shown = [candidate for pair in pairs for candidate in pair.candidates if _words(candidate) is None]
        images = iter(_documents(embedder, shown))
        self._candidates = [
            np.stack(
                [next(images) if (text := _words(candidate)) is None else known[text] for candidate in pair.candidates]
            )
            for pair in pairs
        ]

    def hits(self, embeddings_QD: Floats) -> Bools:
        """Return, per query, whether the candidate of the highest cosine is a right one, bool (Q,)."""
        similar = zip(self.pairs, self._similarities(embeddings_QD), strict=True)
        return np.array([pair.relevant[int(similarity_C.argmax())] for pair, similarity_C in similar])

    def margins(self, embeddings_QD: Floats) -> Floats:
        """Return, per query, by how much the highest cosine exceeds the next, (Q,)."""
        highest = [np.partition(similarity_C, -2)[-2:] for similarity_C in self._similarities(embeddings_QD)]
        return np.array([first - second for second, first in highest], np.float32)

    def _similarities(self, embeddings_QD: Floats) -> Iterator[Floats]:
        return (candidates_CD @ query_D for candidates_CD, query_D in zip(self._candidates, embeddings_QD, strict=True))

    def ranking(self, index: int, query_D: Floats) -> list[int]:
        """Return the candidates of one pair, best first."""
        return [int(found) for found in np.argsort(-(self._candidates[index] @ query_D), kind="stable")]


def _words(candidate: Any) -> str | None:
    """Return what a candidate that is only a text says, None for any other."""
    if isinstance(candidate, str):
        return candidate
    return candidate["text"] if isinstance(candidate, dict) and candidate.keys() == {"text"} else None


def _documents(embedder: Embedder, contents: Sequence[Any]) -> Iterable[Floats]:
    return embedder.encode_document(contents, batch_size=64) if contents else []
