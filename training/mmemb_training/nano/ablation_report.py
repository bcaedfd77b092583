"""The ablation's tables as Markdown, and its figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmemb_deploy.evaluation.theme import LIGHT, drawing

CONTROL_ROWS = {
    "never": "never",
    "always": "always",
    "random_gate": "random at auto's rate",
    "stage3_decision": "stage-3 decision",
    "auto": "GRPO decision",
    "oracle_gate": "oracle",
}
DEPENDENCE_ROWS = {"always": "intact", "shuffled_rationale": "shuffled", "empty_rationale": "emptied"}


def markdown(tables: dict[str, Any]) -> str:
    """Return all tables."""
    parts = [
        f"# Ablation on DigitChain\n\n{tables['queries']} queries of mixed traffic from the test split, "
        f"{max(1, tables['queries'] // 5)} of each family; recipe {tables['recipe']}.",
        "## Selection: which rationales are learnt\n\n" + _selection(tables["selection"]),
        "## The pool, as the evaluator assessed it\n\n" + _pool(tables["pool"]),
        "## Control: who decides, over the final model\n\n" + _control(tables["control"]),
        "## Reward: what the policy decides by itself (score 0.5)\n\n" + _reward(tables["reward"]),
        "## Dependence: always, with the rationale changed; mean ± spread over three seeds\n\n"
        + _dependence(tables["dependence"]),
    ]
    return "\n\n".join(parts) + "\n"


def _selection(table: dict[str, Any]) -> str:
    header = ("rule", "auto hit@1", "tokens", "rate", "always hit@1", "never hit@1", *_families(table))
    rows = [
        (
            rule,
            row["auto"]["hit_at_1"],
            row["auto"]["rationale_tokens"],
            row["auto"]["reasoning_rate"],
            row["always"]["hit_at_1"],
            row["never"]["hit_at_1"],
            *(found["auto"] for found in row["families"].values()),
        )
        for rule, row in table.items()
    ]
    return _table(header, rows)


def _families(table: dict[str, Any]) -> list[str]:
    return [f"{family} (auto)" for family in next(iter(table.values()))["families"]]


def _pool(table: dict[str, Any]) -> str:
    rows = [(kind, name, *counts.values()) for kind, found in table.items() for name, counts in found.items()]
    verdicts = next(iter(table["worker"].values()))
    return _table(("by", "name", *verdicts), rows)


def _control(table: dict[str, Any]) -> str:
    rows = [
        (label, *(table["rows"][mode][key] for key in ("hit_at_1", "reasoning_rate", "rationale_tokens")))
        for mode, label in CONTROL_ROWS.items()
    ]
    families = [(family, *found.values()) for family, found in table["families"].items()]
    before = [
        (f"stage-3 model, {mode}", *(row[key] for key in ("hit_at_1", "reasoning_rate", "rationale_tokens")))
        for mode, row in table["stage3_model"].items()
    ]
    return "\n\n".join(
        [
            _table(("decision", "hit@1", "rate", "tokens"), [*rows, *before]),
            _table(("family", *next(iter(table["families"].values()))), families),
        ]
    )


def _reward(table: dict[str, Any]) -> str:
    shown = "hit_at_1", "reasoning_rate", "rationale_tokens"
    rows = [(name, *(row["auto"][key] for key in shown), row["always"]["hit_at_1"]) for name, row in table.items()]
    return _table(("reward", "auto hit@1", "rate", "tokens", "always hit@1"), rows)


def _dependence(table: dict[str, Any]) -> str:
    rows = [
        (family, *(_spread(found[mode]) for mode in (*DEPENDENCE_ROWS, "auto", "never")))
        for family, found in table.items()
    ]
    return _table(("family", *DEPENDENCE_ROWS.values(), "auto", "never"), rows)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_shown(cell) for cell in line) + " |" for line in lines)


def _shown(cell: Any) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def draw(tables: dict[str, Any], target: Path) -> None:
    """Write the figure as PNG; raises MissingExtraError without matplotlib."""
    with drawing(13, 9) as figure:
        figure.set_layout_engine("constrained")
        (selection, control), (reward, dependence) = figure.subplots(2, 2)
        _bars(selection, tables["selection"])
        _curves(control, tables["control"])
        _dial(reward, tables["reward"])
        _dependence_bars(dependence, tables["dependence"])
        for axes in (selection, control, reward, dependence):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(target, dpi=130)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", pad=12)


def _bars(axes: Any, rules: dict[str, Any]) -> None:
    _title(axes, "Selection: hit@1 of auto on mixed traffic")
    values = [found["auto"]["hit_at_1"] for found in rules.values()]
    colours = [LIGHT.modes["never"]] * (len(values) - 1) + [LIGHT.modes["auto"]]
    axes.bar_label(axes.barh(list(rules), values, color=colours, height=0.6), fmt="%.3f", padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)


def _curves(axes: Any, table: dict[str, Any]) -> None:
    _title(axes, "Control: hit@1 at every reasoning rate, final model")
    rates = list(table["curve"]["rate"].values())
    gates = {name: list(points.values()) for name, points in table["curve"].items() if name != "rate"}
    for (name, points), colour in zip(gates.items(), LIGHT.series, strict=False):
        axes.plot(rates, points, color=colour, linewidth=2, label=name)
    rows = table["rows"]
    for mode, marker in (("auto", "o"), ("oracle_gate", "*")):
        axes.plot(
            rows[mode]["reasoning_rate"],
            rows[mode]["hit_at_1"],
            marker,
            color=LIGHT.ink,
            markersize=9,
            label=CONTROL_ROWS[mode] + (" at the default threshold" if mode == "auto" else ""),
        )
    axes.set_xlabel("reasoning rate")
    axes.legend(loc="lower right")


def _dial(axes: Any, table: dict[str, Any]) -> None:
    _title(axes, "Reward: what the policy decides by itself")
    for index, (name, row) in enumerate(table.items()):
        auto = row["auto"]
        axes.scatter(
            auto["reasoning_rate"], auto["hit_at_1"], s=70, color=LIGHT.series[index % len(LIGHT.series)], label=name
        )
    axes.set_xlabel("reasoning rate")
    axes.set_ylabel("hit@1, mixed traffic")
    axes.legend(loc="best")


def _dependence_bars(axes: Any, table: dict[str, Any]) -> None:
    _title(axes, "Dependence: always, with the rationale changed")
    width = 0.8 / len(DEPENDENCE_ROWS)
    for offset, ((mode, label), colour) in enumerate(zip(DEPENDENCE_ROWS.items(), LIGHT.series, strict=False)):
        means = [statistics.mean(found[mode]) for found in table.values()]
        spreads = [statistics.stdev(found[mode]) for found in table.values()]
        centres = [index + (offset - 1) * width for index in range(len(table))]
        axes.bar(centres, means, width * 0.92, yerr=spreads, color=colour, label=label, error_kw={"ecolor": LIGHT.ink})
    axes.set_xticks(range(len(table)), table)
    axes.set_ylim(0, 1.15)
    axes.legend(ncols=3, loc="upper right")
