"""The tables of strips: who decides, what selection is worth, and how far the cost dial moves the rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmemb_benchmarks.report.method_tables import SELECTION
from mmemb_benchmarks.report.table import Table, caption, read_json

ARMS = {
    "stage 3, threshold": "stage 3's decision, its threshold calibrated",
    "stage 3, score structure": "stage 3, by the margin of the nearest candidate",
    "stage 3, gate on the gap": "stage 3, a gate regressed on the gap",
    "rejection sampling": "a round of rejection sampling",
    "reinforcement": "**reinforcement**",
}
FAMILIES = {
    "short": "chains of 1 and 2",
    "middle": "of 3 to 5",
    "long": "of 6 to 8",
    "evens": "evens",
    "first": "first",
    "same": "same",
}


def control(path: Path) -> Table:
    """Put the arms of control side by side."""
    result = read_json(path)
    rows: list[tuple[str, ...]] = []
    for key, label in ARMS.items():
        found = result["control"][key]
        best, equal = found["best"], found["equal"]
        behind = (_ahead(found["behind"][point]) for point in ("best", "equal")) if "behind" in found else ("", "")
        rates = f"{best['rate']['mean']:.2f}", f"{best['tokens']['mean']:.1f}", f"{best['headroom']['mean']:.2f}"
        rows.append((label, _shown(best["hit_at_1"]), *rates, _shown(equal["hit_at_1"]), *behind))
    ahead = "reinforcement ahead by", "at equal tokens"
    head = "who decides", "hit@1", "rate", "tokens", "headroom", "hit@1 at equal tokens"
    return Table(caption(result), (*head, *ahead), rows)


def families(path: Path) -> Table:
    """Say what never, always and reinforcement's gate give, by family."""
    result = read_json(path)
    rows = [
        (label, *(f"{result['control'][key]['families'][family]:.3f}" for family in FAMILIES))
        for key, label in ARMS.items()
    ]
    return Table(caption(result), ("hit@1", *FAMILIES.values()), rows)


def selection(path: Path) -> Table:
    """Say what each rule of selection came to."""
    result = read_json(path)
    rows: list[tuple[str, ...]] = []
    for key, label in SELECTION.items():
        found = result["selection"][key]
        auto = found["auto"]
        figures = _shown(auto["hit_at_1"]), f"{auto['tokens']['mean']:.1f}", f"{auto['rate']['mean']:.2f}"
        others = (f"{found[mode]['mean']:.3f}" for mode in ("always", "never"))
        rows.append((label, *figures, *others, _ahead(found["behind"]) if "behind" in found else ""))
    head = "rationales learnt", "auto", "its tokens", "its rate", "always", "never", "gain and content ahead by"
    return Table(caption(result), head, rows)


def dial(path: Path) -> Table:
    """Say what the policy decides by itself at each cost."""
    result = read_json(path)
    rows = [
        (f"{float(cost):g}", *(format(found[key], form) for key, form in _DIAL.items()))
        for cost, found in result["dial"].items()
    ]
    return Table(caption(result), ("cost of a rationale of full length", "rate", "tokens", "hit@1"), rows)


_DIAL = {"rate": ".2f", "tokens": ".1f", "hit_at_1": ".3f"}


def _shown(spread: Mapping[str, float]) -> str:
    return f"{spread['mean']:.3f}" + (f" ± {spread['error']:.3f}" if "error" in spread else "")


def _ahead(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    return f"{_shown(difference)} ({low:.3f} to {high:.3f})"
