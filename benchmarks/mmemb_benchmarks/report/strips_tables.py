"""The tables of strips: who decides, what selection is worth, and how far the cost dial moves the rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemb_benchmarks.report.method_tables import SELECTION
from mmemb_benchmarks.report.table import Table, caption, read_json

ARMS = {
    "stage 3, threshold": "stage 3's decision, its threshold calibrated",
    "stage 3, score structure": "stage 3, by the margin of the nearest candidate",
    "stage 3, gate on the gap": "stage 3, a gate regressed on the gap",
    "rejection sampling": "a round of rejection sampling",
    "reinforcement, expected groups": "reinforcement, expected groups",
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

WAYS = {
    "never": "never",
    "always": "always",
    "shuffled_rationale": "always, rationales shuffled",
    "empty_rationale": "always, rationales emptied",
}


def control(path: Path) -> Table:
    """Put the arms of control side by side, between never and always, a random gate and an oracle."""
    result = read_json(path)
    reinforced = result["control"]["reinforcement"]
    rate = f"{reinforced['best']['rate']['mean']:.2f}"
    rows: list[tuple[str, ...]] = [
        (way, _shown(reinforced[way]["hit_at_1"]), *_price(reinforced[way]), *[""] * 4) for way in ("never", "always")
    ]
    rows.append(("random, at reinforcement's rate", _shown(reinforced["best"]["random"]), rate, *[""] * 5))
    for key, label in ARMS.items():
        found = result["control"][key]
        best, equal = found["best"], _shown(found["equal"]["hit_at_1"])
        headroom = f"{best['headroom']['mean']:.2f}"
        rows.append((label, _shown(best["hit_at_1"]), *_price(best), headroom, equal, *_behind(found)))
    rows.append(("oracle, at that rate", _shown(reinforced["best"]["oracle"]), rate, "", "1.00", "", "", ""))
    ahead = "reinforcement ahead by", "at equal tokens"
    head = "who decides", "hit@1", "rate", "tokens", "headroom", "hit@1 at equal tokens"
    return Table(caption(result), (*head, *ahead), rows)


def families(path: Path) -> Table:
    """Say what each family comes to: under reinforcement with its controls, then by who decides."""
    result = read_json(path)
    ways = result["dependence"] | result["control"]["reinforcement"]["families"]
    shown = [(label, ways[key]) for key, label in WAYS.items()]
    shown += [(label, result["control"][key]["families"]["best"]) for key, label in ARMS.items()]
    rows = [(label, *(f"{found[family]:.3f}" for family in FAMILIES)) for label, found in shown]
    return Table(caption(result), ("hit@1", *FAMILIES.values()), rows)


def selection(path: Path) -> Table:
    """Say what each rule of selection came to."""
    result = read_json(path)
    rows: list[tuple[str, ...]] = []
    for key, label in SELECTION.items():
        found = result["selection"][key]
        best, equal = found["best"], _shown(found["equal"]["hit_at_1"])
        others = (f"{found[mode]['mean']:.3f}" for mode in ("always", "never"))
        rows.append((label, _shown(best["hit_at_1"]), *_price(best), equal, *others, *_behind(found)))
    ahead = "gain and content ahead by", "at equal tokens"
    head = "rationales learnt", "auto", "its rate", "its tokens", "auto at equal tokens", "always", "never"
    return Table(caption(result), (*head, *ahead), rows)


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


def _price(found: Mapping[str, Any]) -> tuple[str, str]:
    """Return the rate of reasoning and the tokens a question."""
    return f"{found['rate']['mean']:.2f}", f"{found['tokens']['mean']:.1f}"


def _behind(found: Mapping[str, Any]) -> Sequence[str]:
    """Return by how much ours is ahead of a row, at its best threshold and at equal tokens; nothing for ours itself."""
    return [_ahead(found["behind"][point]) for point in ("best", "equal")] if "behind" in found else ["", ""]


def _ahead(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    return f"{_shown(difference)} ({low:.3f} to {high:.3f})"
