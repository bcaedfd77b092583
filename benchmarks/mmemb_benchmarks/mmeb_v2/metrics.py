"""The benchmark's figures from ranked names: those of its public scorer, and NDCG as it should be.

The public scorer (github.com/TIGER-AI-Lab/VLM2Vec, `src/utils/eval_utils/metrics.py`) takes the labels of a query
through a set before it pairs them with their grades, so that each label gets the grade of whichever label the set puts
in its place. Names are strings, whose order in a set follows the interpreter's hash seed: a perfect ranking of grades
2, 1, 1 scores 1.0, 0.88 or 0.84 from run to run. The official figure here is the one of hash seed 0; the corrected
one gives every label its own grade. The two agree wherever all grades of a query are equal.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmemb_benchmarks.mmeb_v2.data import Key

CUTOFFS = (1, 5, 10)
CORRECTED = "ndcg_linear_corrected@5"
HASH_SEED = "0"
_SET_ORDERS = "import json, sys; json.dump([list(set(labels)) for labels in json.load(sys.stdin)], sys.stdout)"


@dataclass(frozen=True)
class Ranked:
    """One query's outcome: names, best first, at least the first max(CUTOFFS) of them; what is right; how much."""

    prediction: Sequence[Key]
    labels: Sequence[Key]
    grades: Sequence[int] | None = None

    def as_json(self) -> dict[str, object]:
        """Return the query's line of the public prediction file."""
        grades = None if self.grades is None else list(self.grades)
        return {"prediction": list(self.prediction), "label": list(self.labels), "rel_scores": grades}


def scores(queries: Sequence[Ranked]) -> dict[str, float]:
    """Return the means over queries, by the names of the public score files, and the corrected NDCG."""
    graded = [_grades_by_label(query) for query in queries]
    official = _official_grades(queries)
    figures: dict[str, float] = {}
    for name, metric in BINARY.items():
        for cutoff in CUTOFFS:
            figures[f"{name}@{cutoff}"] = _mean([metric(query.prediction, query.labels, cutoff) for query in queries])
    for form, gain in (("linear", float), ("exponential", _exponential)):
        for cutoff in CUTOFFS:
            figures[f"ndcg_{form}@{cutoff}"] = _mean(
                [ndcg(query.prediction, grades, cutoff, gain) for query, grades in zip(queries, official, strict=True)]
            )
    figures[CORRECTED] = _mean(
        [ndcg(query.prediction, grades, 5) for query, grades in zip(queries, graded, strict=True)]
    )
    return figures


def hit(prediction: Sequence[Key], labels: Sequence[Key], cutoff: int) -> float:
    """Return 1 if a right name is among the first `cutoff`."""
    return float(_found(prediction, labels, cutoff) > 0)


def precision(prediction: Sequence[Key], labels: Sequence[Key], cutoff: int) -> float:
    """Return the share of the first `cutoff` places that right names take."""
    return _found(prediction, labels, cutoff) / cutoff


def recall(prediction: Sequence[Key], labels: Sequence[Key], cutoff: int) -> float:
    """Return the share of right names that are among the first `cutoff`."""
    return _found(prediction, labels, cutoff) / len(set(labels))


def f1(prediction: Sequence[Key], labels: Sequence[Key], cutoff: int) -> float:
    """Return the harmonic mean of precision and recall."""
    both = precision(prediction, labels, cutoff), recall(prediction, labels, cutoff)
    return 2 * both[0] * both[1] / sum(both) if sum(both) else 0.0


def average_precision(prediction: Sequence[Key], labels: Sequence[Key], cutoff: int) -> float:
    """Return the mean, over the right names that could be found, of the precision at each one's rank."""
    right = set(labels)
    total, found = 0.0, 0
    for rank, name in enumerate(prediction[:cutoff], start=1):
        if name in right:
            found += 1
            total += found / rank
    return total / min(len(right), cutoff)


def reciprocal_rank(prediction: Sequence[Key], labels: Sequence[Key], cutoff: int) -> float:
    """Return 1 / the rank of the first right name, 0 if it is beyond `cutoff`."""
    right = set(labels)
    return next((1 / rank for rank, name in enumerate(prediction[:cutoff], start=1) if name in right), 0.0)


BINARY = {
    "hit": hit,
    "precision": precision,
    "recall": recall,
    "f1": f1,
    "map": average_precision,
    "mrr": reciprocal_rank,
}


def ndcg(prediction: Sequence[Key], grades: dict[Key, int], cutoff: int, gain: Callable[[int], float] = float) -> float:
    """Return the discounted gain of the first `cutoff` names over that of the best order of the grades."""
    best = _discounted([gain(grade) for grade in sorted(grades.values(), reverse=True)[:cutoff]])
    return _discounted([gain(grades.get(name, 0)) for name in prediction[:cutoff]]) / best


def _exponential(grade: int) -> float:
    return 2.0**grade - 1


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def _found(prediction: Sequence[Key], labels: Sequence[Key], cutoff: int) -> int:
    return len(set(prediction[:cutoff]) & set(labels))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _grades_by_label(query: Ranked) -> dict[Key, int]:
    return dict(zip(query.labels, query.grades or [1] * len(query.labels), strict=True))


def _official_grades(queries: Sequence[Ranked]) -> list[dict[Key, int]]:
    """Return the grades as the public scorer pairs them, its sets in the order of HASH_SEED.

    A running interpreter's seed cannot be changed, so a fresh one orders the sets; the version of Python has a say
    too. Only queries of unequal grades are asked about.
    """
    graded = [_grades_by_label(query) for query in queries]
    unequal = [index for index, grades in enumerate(graded) if len(set(grades.values())) > 1]
    if not unequal:
        return graded
    done = subprocess.run(
        [sys.executable, "-S", "-c", _SET_ORDERS],
        input=json.dumps([list(queries[index].labels) for index in unequal]),
        env=os.environ | {"PYTHONHASHSEED": HASH_SEED},
        capture_output=True,
        text=True,
        check=True,
    )
    for index, order in zip(unequal, json.loads(done.stdout), strict=True):
        graded[index] = dict(zip(order, graded[index].values(), strict=True))
    return graded
