"""The demo's picture: every query with what the model thought and found, and the price of each mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmemb_benchmarks.demo import Demo, Showcase
from mmemb_deploy.errors import MissingExtraError
from mmemb_deploy.routing.router import Route

INK, QUIET, PAPER, LINE = "#1f2933", "#7b8794", "#ffffff", "#e4e7eb"
RIGHT, WRONG = "#2f855a", "#c53030"
COLOURS = {"never": "#9aa5b1", "always": "#dd8a3e", "auto": "#2b7a9b"}
ROUTE_COLOURS = {Route.FAST: "#5b6b7a", Route.REASON: "#2b7a9b"}
SYMBOLS = {"+": "+", "-": "\N{MINUS SIGN}", "x": "\N{MULTIPLICATION SIGN}"}
ROW, TOP, BOTTOM, WIDTH = 0.92, 1.15, 2.9, 13.0  # inches
TILE = 0.62  # side of a digit, inches


def draw(demo: Demo, target: Path) -> None:
    """Write the picture as PNG; raises MissingExtraError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    matplotlib.rcParams.update({"font.family": "sans-serif", "font.size": 10, "text.color": INK})
    height = TOP + ROW * len(demo.showcases) + BOTTOM
    figure = Figure(figsize=(WIDTH, height), facecolor=PAPER)
    page = _Page(figure, height)
    page.text(0.45, 0.42, "One embedder, two routes", size=19, weight="bold")
    subtitle = "Handwritten digits that training never saw. The gate decides which question is worth a thought."
    page.text(0.45, 0.76, subtitle, size=11, color=QUIET)
    for x, title in ((0.45, "ASKED"), (5.35, "THOUGHT"), (9.6, "FOUND")):
        page.text(x, 1.08, title, size=8.5, weight="bold", color=QUIET)
    for place, showcase in enumerate(demo.showcases):
        _row(page, showcase, TOP + ROW * place)
    _bars(page, demo, TOP + ROW * len(demo.showcases))
    figure.savefig(target, dpi=130, facecolor=PAPER)


class _Page:
    """A figure addressed in inches from its top left corner."""

    def __init__(self, figure: Any, height: float) -> None:
        self.figure, self.height = figure, height

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / WIDTH, 1 - y / self.height, text, va=style.pop("va", "center"), **style)

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        return self.figure.add_axes((x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height))

    def rule(self, y: float) -> None:
        axes = self.axes(0.45, y, WIDTH - 0.9, 0.01)
        axes.set_axis_off()
        axes.axhline(0, color=LINE, linewidth=1)

    def tile(self, x: float, y: float, content: dict[str, Any], frame: str, thickness: float) -> None:
        """Draw a digit or a word in a frame."""
        axes = self.axes(x, y, TILE, TILE)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(frame)
        axes.spines[:].set_linewidth(thickness)
        if "image" in content:
            axes.imshow(255 - content["image"], cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
        else:
            axes.text(0.5, 0.5, content["text"], ha="center", va="center", size=9.5)


def _row(page: _Page, showcase: Showcase, top: float) -> None:
    page.rule(top)
    middle, tile_top = top + ROW / 2, top + (ROW - TILE) / 2
    example, detail = showcase.example, showcase.detail
    content = example.content
    images = content.get("images") or ([content["image"]] if "image" in content else [])
    x = 0.45
    symbols = content.get("text", "").split()[1::2] if images else []
    for place, pixels in enumerate(images):
        page.tile(x, tile_top, {"image": pixels}, LINE, 1)
        x += TILE
        if place < len(symbols):
            page.text(x + 0.13, middle, SYMBOLS[symbols[place]], size=13, ha="center")
            x += 0.26
    if images:
        page.text(x + 0.15, middle, example.instruction, size=9.5, color=QUIET) if len(images) == 1 else None
    else:
        page.text(0.45, middle, f"“{content['text']}”", size=12)
    colour = ROUTE_COLOURS[detail.route]
    page.text(5.35, middle - 0.16, f"{detail.route.value} route", size=9.5, weight="bold", color=colour)
    page.text(6.6, middle - 0.16, f"gate {detail.gate_score:.3f}", size=9.5, color=QUIET)
    thought = detail.rationale or "no rationale: embedded directly"
    page.text(
        5.35,
        middle + 0.14,
        thought,
        size=10.5 if len(thought) < 44 else 8.8,
        color=INK if detail.rationale else QUIET,
        style="normal" if detail.rationale else "italic",
    )
    for rank, place in enumerate(showcase.ranking):
        candidate, right = example.candidates[place], example.relevant[place]
        frame = (RIGHT if right else WRONG) if rank == 0 else LINE
        page.tile(9.6 + rank * (TILE + 0.16), tile_top, candidate.content, frame, 2.5 if rank == 0 else 1)
    page.text(
        9.6 + 3 * (TILE + 0.16) + 0.05,
        middle,
        "right" if showcase.found else "wrong",
        size=10,
        weight="bold",
        color=RIGHT if showcase.found else WRONG,
    )


def _bars(page: _Page, demo: Demo, top: float) -> None:
    page.rule(top)
    summaries = {mode: outcome.summary() for mode, outcome in demo.modes.items()}
    count = len(next(iter(demo.modes.values())).hits_Q)
    page.text(
        0.45, top + 0.38, f"With and without reasoning, on {count} queries of mixed traffic", size=12.5, weight="bold"
    )
    charts: list[tuple[str, str, Callable[[float], str]]] = [
        ("hit_at_1", "hit@1", lambda value: f"{value:.1%}"),
        ("rationale_tokens", "rationale tokens per query", lambda value: f"{value:.1f}"),
        ("p50_ms", "latency alone, median", lambda value: f"{value:.1f} ms"),
    ]
    label = 0.62  # inches left of each chart for the modes' names
    width = (WIDTH - 0.9) / len(charts) - label
    for place, (key, title, written) in enumerate(charts):
        axes = page.axes(0.45 + label + place * (width + label), top + 0.95, width, BOTTOM - 1.35)
        values = [summary[key] for summary in summaries.values()]
        names = list(summaries)
        axes.barh(names, values, color=[COLOURS[name] for name in names], height=0.62)
        axes.set_xlim(0, max(*values, 1e-9) * 1.28)
        for line, value in enumerate(values):
            axes.text(value + max(values) * 0.025, line, written(value), va="center", size=10)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0, labelsize=10.5)
        axes.spines[:].set_visible(False)
        axes.spines["left"].set_visible(True)
        axes.spines["left"].set_color(LINE)
        axes.set_title(title, loc="left", size=10, color=QUIET, pad=8)
