"""Pairs are read with care and judged by the nearest candidate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemb_deploy import Embedder, OptionError
from mmemb_deploy.evaluation.pairs import Judge, Pair, encode_queries, read_pairs

PAIRS = [
    Pair(query="one", candidates=["one", {"text": "two"}], relevant=[True, False], instruction=""),
    Pair(query={"text": "two"}, candidates=["one", "two"], relevant=[True, False], instruction=""),
    Pair(query="three", candidates=["nine", "three"], relevant=[False, True], instruction=""),
]


def test_a_query_hits_where_its_nearest_candidate_is_right(tiny_embedder: Embedder) -> None:
    judge = Judge(tiny_embedder, PAIRS)
    queries_QD = encode_queries(tiny_embedder, PAIRS, reasoning="never").embeddings_QD
    assert judge.hits(queries_QD).tolist() == [True, False, True]
    assert [judge.ranking(place, queries_QD[place]) for place in range(3)] == [[0, 1], [1, 0], [1, 0]]


def test_each_pair_is_encoded_with_its_own_instruction_and_rationale(tiny_embedder: Embedder) -> None:
    pairs = [pair.model_copy(update={"instruction": f"Task {place}."}) for place, pair in enumerate(PAIRS)]
    encoded = encode_queries(tiny_embedder, pairs, reasoning="never", rationales=["a", None, "tiny"])
    assert [detail.rationale for detail in encoded.details] == ["a", None, "tiny"]
    alone = tiny_embedder.encode(["two"], instruction="Task 1.", reasoning="never")
    np.testing.assert_allclose(encoded.embeddings_QD[1], alone[0], atol=1e-5)


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_pairs_are_read_from_json_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [pair.model_dump() for pair in PAIRS])
    assert read_pairs(path) == PAIRS


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: Expecting"),
        ([{"query": "a", "candidates": ["b"], "relevant": [True]}, {"query": "a"}], "line 2: .* validation errors"),
        ([{"query": "a", "candidates": ["b"], "relevant": [False]}], "line 1: relevant needs one value per candidate"),
        ([{"query": "a", "candidates": ["b"], "relevant": [True, True]}], "line 1: relevant needs"),
        ([], "holds no pair"),
    ],
)
def test_a_malformed_pair_names_its_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_pairs(write_lines(tmp_path / "pairs.jsonl", lines))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not a file"):
        read_pairs(tmp_path / "absent.jsonl")
