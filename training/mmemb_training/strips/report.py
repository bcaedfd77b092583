"""The benchmark over all seeds: means, intervals and differences, as one JSON result and as Markdown.

A difference between arms is that of the same questions: its standard error is over seeds, and its interval that of a
bootstrap over questions, each averaged over seeds. Axes: S seeds, Q questions, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_training.strips.benchmark import DEPENDENCE, REINFORCED
from mmemb_training.strips.method import RULES
from mmemb_training.strips.questions import FAMILIES

DRAWS = 2000  # of the bootstrap
FIGURES = ("hit_at_1", "rate", "tokens", "random", "oracle", "headroom")
SHOWN = ("hit_at_1", "rate", "tokens", "headroom")
POINTS = ("best", "equal")
WAYS = ("never", "always", *POINTS)
Tables = Mapping[str, Any]


def result(seeds: Sequence[Tables]) -> dict[str, Any]:
    """Return all tables over seeds; means, and standard errors where there are two seeds or more."""
    arms = seeds[0]["control"]["arms"]
    return {
        "seeds": len(seeds),
        "judge_auc": _spread([one["pool"]["auc"] for one in seeds]),
        "needy_without": _spread([one["pool"]["needy_without"] for one in seeds]),
        "control": {name: _arm(seeds, name) for name in arms},
        "dependence": {mode: _families([one["dependence"][mode] for one in seeds]) for mode in DEPENDENCE},
        "selection": {rule: _rule(seeds, rule) for rule in RULES},
        "dial": next((one["dial"] for one in seeds if one["dial"]), {}),
    }


def _arm(seeds: Sequence[Tables], name: str) -> dict[str, Any]:
    found = [one["control"]["arms"][name] for one in seeds]
    row: dict[str, Any] = {
        way: {figure: _spread([one[way][figure] for one in found]) for figure in FIGURES} for way in WAYS
    }
    row["families"] = {way: _families([one["families"][way] for one in found]) for way in WAYS}
    if name != REINFORCED:
        row["behind"] = {point: _difference(seeds, name, f"hits_{point}") for point in POINTS}
    return row


def _difference(seeds: Sequence[Tables], name: str, hits: str) -> dict[str, Any]:
    """Return by how much reinforcement is ahead of an arm."""
    pairs = [one["control"]["arms"] for one in seeds]
    return _paired(np.array([arms[REINFORCED][hits] for arms in pairs]), np.array([arms[name][hits] for arms in pairs]))


def _rule(seeds: Sequence[Tables], rule: str) -> dict[str, Any]:
    found, ours = ([one["selection"][each] for one in seeds] for each in (rule, RULES[0]))
    row: dict[str, Any] = {way: _spread([one[way] for one in found]) for way in ("never", "always")}
    for point in POINTS:
        row[point] = {figure: _spread([one[point][figure] for one in found]) for figure in FIGURES[:3]}
    row["families"] = _families([one["families"] for one in found])
    if rule != RULES[0]:
        row["behind"] = {
            point: _paired(*(np.array([one[f"hits_{point}"] for one in arm]) for arm in (ours, found)))
            for point in POINTS
        }
    return row


def _families(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {family: float(np.mean([row[family] for row in rows])) for family in FAMILIES}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return the mean, and its standard error where there is more than one value."""
    mean = {"mean": float(np.mean(values))}
    return mean | ({"error": float(np.std(values, ddof=1) / len(values) ** 0.5)} if len(values) > 1 else {})


def _paired(ours_SQ: NDArray[np.float64], theirs_SQ: NDArray[np.float64]) -> dict[str, Any]:
    """Return the mean difference, its standard error over seeds, and the bootstrap's 95% interval over questions."""
    by_question_Q = (ours_SQ - theirs_SQ).mean(axis=0)
    rng = np.random.default_rng(0)
    drawn_B = [rng.choice(by_question_Q, len(by_question_Q)).mean() for _ in range(DRAWS)]
    low, high = np.quantile(drawn_B, (0.025, 0.975))
    return _spread((ours_SQ - theirs_SQ).mean(axis=1).tolist()) | {"interval": [float(low), float(high)]}


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    control = [
        (
            name,
            *(_shown(row["best"][figure]) for figure in SHOWN),
            _shown(row["equal"]["hit_at_1"]),
            *(_ahead(row["behind"][point]) if "behind" in row else "" for point in POINTS),
        )
        for name, row in found["control"].items()
    ]
    reinforced = found["control"][REINFORCED]["families"]
    ways = {way: reinforced[way] for way in ("never", "always")}
    ways |= {mode.replace("_", " "): found["dependence"][mode] for mode in DEPENDENCE[1:]}
    ways |= {name: row["families"]["best"] for name, row in found["control"].items()}
    families = [(name, *(f"{row[one]:.3f}" for one in FAMILIES)) for name, row in ways.items()]
    selection = [
        (
            rule,
            *(_shown(row["best"][figure]) for figure in FIGURES[:3]),
            _shown(row["equal"]["hit_at_1"]),
            _shown(row["always"]),
            _shown(row["never"]),
            *(_ahead(row["behind"][point]) if "behind" in row else "" for point in POINTS),
            *(f"{row['families'][one]:.3f}" for one in FAMILIES),
        )
        for rule, row in found["selection"].items()
    ]
    dial = [
        (cost, *(f"{row[name]:.3f}" for name in ("rate", "tokens", "hit_at_1"))) for cost, row in found["dial"].items()
    ]
    ahead = ("reinforcement ahead by", "at equal tokens")
    rules = ("rule", "hit@1", "rate", "tokens", "hit@1 at equal tokens")
    parts = [
        f"# Strips\n\n{found['seeds']} seeds; the judge's AUC is {_shown(found['judge_auc'])}, and "
        f"{_shown(found['needy_without'])} of the questions that a rationale would help kept none.",
        "## Who decides\n\n"
        + _table(("arm", "hit@1", "rate", "tokens", "headroom", "hit@1 at equal tokens", *ahead), control),
        "## By family, at the best threshold\n\n" + _table(("arm", *FAMILIES), families),
        "## Selection\n\n"
        + _table((*rules, "always", "never", "gain and content ahead by", "at equal tokens", *FAMILIES), selection),
        "## The cost dial, by the policy's own decision\n\n" + _table(("cost", "rate", "tokens", "hit@1"), dial),
    ]
    return "\n\n".join(parts) + "\n"


def _shown(spread: Mapping[str, float]) -> str:
    return f"{spread['mean']:.3f}" + (f" ± {spread['error']:.3f}" if "error" in spread else "")


def _ahead(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    return f"{_shown(difference)} ({low:.3f} to {high:.3f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))
