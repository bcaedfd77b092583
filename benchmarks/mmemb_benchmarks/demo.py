"""What `mmemb demo` shows and draws: real digits and questions about them, how each was embedded, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.controls import compare_modes
from mmemb_deploy.evaluation.digitchain import DigitChain, Example
from mmemb_deploy.evaluation.pairs import Judge, Pair, encode_queries
from mmemb_deploy.evaluation.routes import Outcome
from mmemb_deploy.evaluation.theme import LIGHT, drawing
from mmemb_deploy.results import Detail
from mmemb_deploy.routing.router import Route

SHOWN = ("match", "name", "chain-2", "chain-3", "chain-4", "chain-5", "text")
SHOWN_MATCHES = 3
MEASURED_PAIRS = 200
DEMO_MODES = ("never", "auto", "always")

SYMBOLS = {"+": "+", "-": "\N{MINUS SIGN}", "x": "\N{MULTIPLICATION SIGN}"}
WIDTH, TOP, ROW, BOTTOM = 13.0, 1.3, 0.92, 2.9  # inches of the picture, and of its parts from top to bottom
ASKED, THOUGHT, FOUND = 0.45, 5.35, 9.6  # inches from the left, of the columns
TILE, GAP = 0.62, 0.16  # inches: the side of a digit, and between two that were found


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
        for index in range(len(content.get("images", []))):
            words = words.replace("abcde"[index], "\N{WHITE SQUARE}")
        return words

    @property
    def found(self) -> bool:
        """Whether the best match is a right one."""
        return self.example.relevant[self.ranking[0]]

    @property
    def thought(self) -> str:
        """The rationale, a step after the other; empty where there is none."""
        return (self.detail.rationale or "").rstrip(";").replace(";", "; ")


def run_demo(embedder: Embedder, seed: int) -> tuple[list[Showcase], dict[str, Outcome]]:
    """Embed one query of every family; measure never, auto and always on mixed traffic. All is from the test split."""
    source = DigitChain("test", seed)
    examples = [example for family in SHOWN for example in source.examples(family, 1)]
    pairs = [Pair.of(example) for example in examples]
    judge, encoded = Judge(embedder, pairs), encode_queries(embedder, pairs)
    showcases = [
        Showcase(example, detail, judge.ranking(index, encoded.embeddings_QD[index])[:SHOWN_MATCHES])
        for index, (example, detail) in enumerate(zip(examples, encoded.details, strict=True))
    ]
    mixed = [Pair.of(example) for example in source.mixed(MEASURED_PAIRS)]
    outcomes = compare_modes(embedder, mixed, seed, timed=MEASURED_PAIRS)
    return showcases, {mode: outcomes[mode] for mode in DEMO_MODES}


def draw(showcases: Sequence[Showcase], modes: Mapping[str, Outcome], target: Path) -> None:
    """Write the picture as PNG; raises MissingExtraError without matplotlib."""
    with drawing(WIDTH, TOP + ROW * len(showcases) + BOTTOM) as figure:
        _text(figure, ASKED, 0.42, "One embedder, two routes", size=19, weight="bold")
        subtitle = "Handwritten digits that training never saw. The gate decides which question is worth a thought."
        _text(figure, ASKED, 0.76, subtitle, size=11, color=LIGHT.quiet)
        for x, title in ((ASKED, "ASKED"), (THOUGHT, "THOUGHT"), (FOUND, "FOUND")):
            _text(figure, x, TOP - 0.14, title, size=8.5, weight="bold", color=LIGHT.quiet)
        for index, showcase in enumerate(showcases):
            _draw_row(figure, showcase, TOP + ROW * index)
        _draw_bars(figure, modes, TOP + ROW * len(showcases))
        figure.savefig(target, dpi=130)


def _draw_row(figure: Any, showcase: Showcase, top: float) -> None:
    _rule(figure, top)
    middle = top + ROW / 2
    example, detail = showcase.example, showcase.detail
    content = example.content
    images = content.get("images") or ([content["image"]] if "image" in content else [])
    symbols = content["text"].split()[1::2] if len(images) > 1 else []
    x = ASKED
    for index, pixels in enumerate(images):
        _tile(figure, x, middle, {"image": pixels}, LIGHT.line, 1)
        x += TILE
        if index < len(symbols):
            _text(figure, x + 0.13, middle, SYMBOLS[symbols[index]], size=13, ha="center")
            x += 0.26
    if len(images) == 1:
        _text(figure, x + 0.15, middle, example.instruction, size=9.5, color=LIGHT.quiet)
    elif not images:
        _text(figure, ASKED, middle, f"“{content['text']}”", size=12)
    colour = LIGHT.modes["auto"] if detail.route is Route.REASON else LIGHT.quiet
    _text(figure, THOUGHT, middle - 0.16, f"{detail.route.value} route", size=9.5, weight="bold", color=colour)
    _text(figure, THOUGHT + 1.25, middle - 0.16, f"gate {detail.gate_score:.3f}", size=9.5, color=LIGHT.quiet)
    if showcase.thought:
        _text(figure, THOUGHT, middle + 0.14, showcase.thought, size=10.5 if len(showcase.thought) < 44 else 8.8)
    else:
        words = "no rationale: embedded directly"
        _text(figure, THOUGHT, middle + 0.14, words, size=10.5, color=LIGHT.quiet, style="italic")
    verdict, colour = ("right", LIGHT.right) if showcase.found else ("wrong", LIGHT.wrong)
    for rank, index in enumerate(showcase.ranking):
        frame, thickness = (LIGHT.line, 1.0) if rank else (colour, 2.5)
        _tile(figure, FOUND + rank * (TILE + GAP), middle, example.candidates[index].content, frame, thickness)
    _text(figure, FOUND + SHOWN_MATCHES * (TILE + GAP) + 0.05, middle, verdict, size=10, weight="bold", color=colour)


def _draw_bars(figure: Any, modes: Mapping[str, Outcome], top: float) -> None:
    _rule(figure, top)
    summaries = {mode: outcome.summary() for mode, outcome in modes.items()}
    title = f"With and without reasoning, on {MEASURED_PAIRS} queries of mixed traffic"
    _text(figure, ASKED, top + 0.38, title, size=12.5, weight="bold")
    charts: list[tuple[str, str, Callable[[float], str]]] = [
        ("hit_at_1", "hit@1", lambda value: f"{value:.1%}"),
        ("rationale_tokens", "rationale tokens per query", lambda value: f"{value:.1f}"),
        ("p50_ms", "latency alone, median", lambda value: f"{value:.1f} ms"),
    ]
    names = 0.62  # inches left of each chart for the modes' names
    width = (WIDTH - 2 * ASKED) / len(charts) - names
    for index, (key, title, shown) in enumerate(charts):
        axes = _axes(figure, ASKED + names + index * (width + names), top + 0.95, width, BOTTOM - 1.35)
        values = [summary[key] for summary in summaries.values()]
        axes.barh(list(summaries), values, color=[LIGHT.modes[mode] for mode in summaries], height=0.62)
        axes.set_xlim(0, max(*values, 1e-9) * 1.28)
        for line, value in enumerate(values):
            axes.text(value + max(values) * 0.025, line, shown(value), va="center", size=10)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.tick_params(axis="y", labelsize=10.5)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_title(title, loc="left", size=10, color=LIGHT.quiet, pad=8)


def _axes(figure: Any, x: float, y: float, width: float, height: float) -> Any:
    """Return axes at inches from the figure's top left corner."""
    whole = figure.get_figheight()
    return figure.add_axes((x / WIDTH, 1 - (y + height) / whole, width / WIDTH, height / whole))


def _text(figure: Any, x: float, y: float, text: str, **style: Any) -> None:
    figure.text(x / WIDTH, 1 - y / figure.get_figheight(), text, va="center", **style)


def _rule(figure: Any, y: float) -> None:
    axes = _axes(figure, ASKED, y, WIDTH - 2 * ASKED, 0.01)
    axes.set_axis_off()
    axes.axhline(0, color=LIGHT.line, linewidth=1)


def _tile(figure: Any, x: float, middle: float, content: dict[str, Any], frame: str, thickness: float) -> None:
    """Draw a digit or a word in a frame."""
    axes = _axes(figure, x, middle - TILE / 2, TILE, TILE)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=frame, linewidth=thickness)
    if "image" in content:
        axes.imshow(255 - content["image"], cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    else:
        axes.text(0.5, 0.5, content["text"], ha="center", va="center", size=9.5)
