"""The ablation's tables as Markdown, and its figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import MissingExtraError

INK, QUIET, LINE, PAPER = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"
COLOURS = ("#2b7a9b", "#dd8a3e", "#9aa5b1", "#5f7d4e", "#8c5e8f")
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
        "## The pool, as the evaluator judged it\n\n" + _pool(tables["pool"]),
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
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    matplotlib.rcParams.update(
        {"font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.edgecolor": LINE}
    )
    figure = Figure(figsize=(13, 9), facecolor=PAPER, layout="constrained")
    (selection, control), (reward, dependence) = figure.subplots(2, 2)
    rules = tables["selection"]
    _bars(
        selection,
        "Selection: hit@1 of auto on mixed traffic",
        {rule: found["auto"]["hit_at_1"] for rule, found in rules.items()},
    )
    _curves(control, tables["control"])
    _dial(reward, tables["reward"])
    _dependence_bars(dependence, tables["dependence"])
    for axes in (selection, control, reward, dependence):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=QUIET, length=0)
    figure.savefig(target, dpi=130, facecolor=PAPER)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=12)


def _bars(axes: Any, title: str, values: dict[str, float]) -> None:
    _title(axes, title)
    places = range(len(values))
    axes.barh(places, values.values(), color=[COLOURS[2]] * (len(values) - 1) + [COLOURS[0]], height=0.6)
    axes.set_yticks(places, values, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    for place, value in zip(places, values.values(), strict=True):
        axes.text(value + 0.01, place, f"{value:.3f}", va="center", color=INK)


def _curves(axes: Any, table: dict[str, Any]) -> None:
    _title(axes, "Control: hit@1 at every reasoning rate, final model")
    rates = list(table["curve"]["rate"].values())
    for (name, points), colour in zip(
        ((name, points) for name, points in table["curve"].items() if name != "rate"), COLOURS, strict=False
    ):
        axes.plot(rates, list(points.values()), color=colour, linewidth=2, label=name)
    rows = table["rows"]
    for mode, marker in (("auto", "o"), ("oracle_gate", "*")):
        axes.plot(
            rows[mode]["reasoning_rate"],
            rows[mode]["hit_at_1"],
            marker,
            color=INK,
            markersize=9,
            label=CONTROL_ROWS[mode] + (" at the default threshold" if mode == "auto" else ""),
        )
    axes.set_xlabel("reasoning rate", color=QUIET)
    axes.legend(frameon=False, loc="lower right")


def _dial(axes: Any, table: dict[str, Any]) -> None:
    _title(axes, "Reward: what the policy decides by itself")
    for place, (name, row) in enumerate(table.items()):
        auto = row["auto"]
        axes.scatter(auto["reasoning_rate"], auto["hit_at_1"], s=70, color=COLOURS[place % len(COLOURS)], label=name)
    axes.set_xlabel("reasoning rate", color=QUIET)
    axes.set_ylabel("hit@1, mixed traffic", color=QUIET)
    axes.legend(frameon=False, loc="best")


def _dependence_bars(axes: Any, table: dict[str, Any]) -> None:
    _title(axes, "Dependence: always, with the rationale changed")
    width = 0.8 / len(DEPENDENCE_ROWS)
    for offset, ((mode, label), colour) in enumerate(zip(DEPENDENCE_ROWS.items(), COLOURS, strict=False)):
        means = [statistics.mean(found[mode]) for found in table.values()]
        spreads = [statistics.stdev(found[mode]) for found in table.values()]
        places = [place + (offset - 1) * width for place in range(len(table))]
        axes.bar(places, means, width * 0.92, yerr=spreads, color=colour, label=label, error_kw={"ecolor": INK})
    axes.set_xticks(range(len(table)), table, color=INK)
    axes.set_ylim(0, 1.15)
    axes.legend(frameon=False, ncols=3, loc="upper right")
