"""The charts of a report: drawn by matplotlib, small enough for a phone, once for each theme."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from mmemb_benchmarks.measure.frontier import FrontierResult
from mmemb_benchmarks.measure.latency import LatencyResult
from mmemb_benchmarks.measure.load import LoadResult
from mmemb_benchmarks.peers.run import PeersResult
from mmemb_benchmarks.results import digits

WIDTH = 4.8  # inches
MODES = "never", "auto", "always"
STAGES = "preprocess", "vision", "prefill", "gate", "decode", "other"


@dataclass(frozen=True)
class Theme:
    """Colours on a background; those of the modes stay apart for colour-blind eyes too."""

    ink: str
    quiet: str
    line: str
    paper: str
    modes: dict[str, str]
    stages: dict[str, str]


LIGHT = Theme(
    ink="#1f2933",
    quiet="#616e7c",
    line="#d5dae0",
    paper="#ffffff",
    modes={"never": "#8592a0", "auto": "#0b6e99", "always": "#d9730d"},
    stages={
        "preprocess": "#c3cbd3",
        "vision": "#7cb5a8",
        "prefill": "#0b6e99",
        "gate": "#3b3f8f",
        "decode": "#d9730d",
        "other": "#e6d3a8",
    },
)
DARK = Theme(
    ink="#e4e7eb",
    quiet="#9aa5b1",
    line="#3a4552",
    paper="#1a222b",
    modes={"never": "#9aa5b1", "auto": "#4db5de", "always": "#f2994a"},
    stages={
        "preprocess": "#66717d",
        "vision": "#5fa898",
        "prefill": "#4db5de",
        "gate": "#8f93e6",
        "decode": "#f2994a",
        "other": "#b59f6a",
    },
)

Draw = Callable[[Any, Theme], None]


@dataclass(frozen=True)
class Chart:
    """A drawing: its name, what it shows in words, its height in inches, and how its axes are filled."""

    name: str
    alt: str
    height: float
    draw: Draw

    def svg(self, theme: Theme) -> str:
        """Return the drawing as a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(self._save("svg", theme)).decode()

    def png(self) -> bytes:
        """Return the drawing on white."""
        return self._save("png", LIGHT)

    def _save(self, kind: str, theme: Theme) -> bytes:
        # without a salt and a date, the same figures give the same bytes
        with rc_context(
            {
                "font.size": 10,
                "font.family": "sans-serif",
                "legend.frameon": False,
                "legend.labelcolor": theme.ink,
                "svg.hashsalt": self.name,
            }
        ):
            figure = Figure(figsize=(WIDTH, self.height), layout="constrained", facecolor=theme.paper)
            axes = figure.add_subplot(facecolor=theme.paper)
            axes.spines[:].set_visible(False)
            axes.tick_params(which="both", colors=theme.quiet, length=0, labelcolor=theme.ink)
            axes.xaxis.label.set_color(theme.quiet)
            axes.yaxis.label.set_color(theme.quiet)
            self.draw(axes, theme)
            saved = io.BytesIO()
            options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 200}
            figure.savefig(saved, format=kind, **options)
            return saved.getvalue()


def latency_chart(name: str, latency: LatencyResult) -> Chart:
    """Draw the median of every mode as a bar, and its 95th percentile as a mark."""

    def draw(axes: Any, theme: Theme) -> None:
        modes = [mode for mode in MODES if mode in latency.modes]
        widest = max(latency.modes[mode].p95_ms for mode in modes)
        for place, mode in enumerate(modes):
            times = latency.modes[mode]
            axes.barh(place, times.p50_ms, height=0.55, color=theme.modes[mode])
            axes.plot([times.p50_ms, times.p95_ms], [place, place], color=theme.modes[mode], linewidth=1.5, zorder=0)
            axes.plot([times.p95_ms] * 2, [place - 0.16, place + 0.16], color=theme.modes[mode], linewidth=2)
            axes.text(
                times.p95_ms + 0.02 * widest,
                place,
                f"{digits(times.p50_ms)} / {digits(times.p95_ms)}",
                va="center",
                color=theme.ink,
            )
        axes.set_xlim(0, 1.3 * widest)
        _label_bars(axes, modes, "ms alone: bar the median, mark the 95th percentile")

    told = "; ".join(
        f"{mode} {digits(times.p50_ms)} ms, p95 {digits(times.p95_ms)} ms" for mode, times in latency.modes.items()
    )
    return Chart(f"{name}-latency", f"Median latency of a request alone: {told}", 1.9, draw)


def stages_chart(name: str, latency: LatencyResult) -> Chart:
    """Draw where each mode's mean time goes."""

    def draw(axes: Any, theme: Theme) -> None:
        modes = [mode for mode in MODES if mode in latency.modes]
        for place, mode in enumerate(modes):
            left = 0.0
            for stage in STAGES:
                width = latency.modes[mode].stages_ms.get(stage, 0.0)
                label = stage if place == 0 else None
                axes.barh(place, width, left=left, height=0.55, color=theme.stages[stage], label=label)
                left += width
        _label_bars(axes, modes, "mean ms of a request alone")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, handlelength=1.1, fontsize=9)

    told = "; ".join(
        f"{mode}: "
        + ", ".join(f"{stage} {digits(times.stages_ms[stage])}" for stage in STAGES if stage in times.stages_ms)
        for mode, times in latency.modes.items()
    )
    return Chart(f"{name}-stages", f"Mean milliseconds by stage: {told}", 2.4, draw)


def frontier_chart(name: str, frontier: FrontierResult) -> Chart:
    """Draw quality over latency as the gate's threshold falls, between lots and hindsight."""

    def draw(axes: Any, theme: Theme) -> None:
        styles = {
            "oracle": ("hindsight (oracle)", theme.quiet, ":"),
            "random": ("drawing lots", theme.modes["never"], "--"),
            "curve": ("the gate", theme.modes["auto"], "-"),
        }
        for key, (label, colour, style) in styles.items():
            points = getattr(frontier, key)
            axes.plot(
                [point.latency_ms for point in points],
                [point.hit_at_1 for point in points],
                style,
                color=colour,
                label=label,
                linewidth=2.2 if key == "curve" else 1.6,
            )
        chosen = frontier.default
        axes.plot([chosen.latency_ms], [chosen.hit_at_1], "o", color=theme.modes["auto"], markersize=8, zorder=5)
        axes.annotate(
            f"default: {chosen.reasoning_rate:.0%} reason",
            (chosen.latency_ms, chosen.hit_at_1),
            (10, -16),
            textcoords="offset points",
            color=theme.ink,
        )
        _grid(axes, theme)
        axes.set_xlabel("mean ms of a query alone")
        axes.set_ylabel("hit@1")
        axes.legend(loc="lower right")

    chosen, last = frontier.default, frontier.curve[-1]
    told = (
        f"the default reaches {chosen.hit_at_1:.3f} at {digits(chosen.latency_ms)} ms; "
        f"with all reasoning it is {last.hit_at_1:.3f} at {digits(last.latency_ms)} ms"
    )
    return Chart(f"{name}-frontier", f"hit@1 against mean latency over the gate's threshold: {told}", 3.2, draw)


def load_chart(name: str, load: LoadResult) -> Chart:
    """Draw the 95th percentile over the rate of arrivals, the better where one was tried twice, and the target."""

    def draw(axes: Any, theme: Theme) -> None:
        for mode, found in load.modes.items():
            best: dict[float, float] = {}
            for trial in found.trials:
                best[trial.rate_per_s] = min(trial.p95_ms, best.get(trial.rate_per_s, trial.p95_ms))
            axes.plot(*zip(*best.items(), strict=True), "o-", color=theme.modes[mode], label=mode, markersize=4, lw=1.8)
        axes.axhline(load.target_p95_ms, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"target {digits(load.target_p95_ms)} ms",
            (1, load.target_p95_ms),
            (-2, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=theme.ink,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1},
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        _grid(axes, theme)
        axes.set_xlim(left=0)
        axes.set_xlabel("arrivals a second")
        axes.set_ylabel("p95, ms")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    told = "; ".join(f"{mode} {digits(found.sustainable_per_s)}" for mode, found in load.modes.items())
    alt = f"Sustained requests a second with p95 below {digits(load.target_p95_ms)} ms: {told}"
    return Chart(f"{name}-load", alt, 3.0, draw)


def peers_chart(name: str, peers: PeersResult, what: str) -> Chart:
    """Draw how many times faster than the baseline each peer does one thing."""
    base = peers.peers[peers.baseline].seconds[what]
    ratios = {peer: base / found.seconds[what] for peer, found in peers.peers.items() if what in found.seconds}
    ordered = dict(sorted(ratios.items(), key=lambda item: item[1]))

    def draw(axes: Any, theme: Theme) -> None:
        for place, (peer, ratio) in enumerate(ordered.items()):
            colour = theme.modes["never"] if peer == peers.baseline else theme.modes["auto"]
            axes.barh(place, ratio, height=0.6, color=colour)
            axes.text(ratio + 0.02 * max(ordered.values()), place, f"{ratio:.2f}x", va="center", color=theme.ink)
        axes.set_xlim(0, 1.2 * max(ordered.values()))
        axes.set_yticks(range(len(ordered)), list(ordered))
        axes.set_xticks([])

    told = "; ".join(f"{peer} {ratio:.2f}" for peer, ratio in reversed(ordered.items()))
    alt = f"{what}, times faster than {peers.baseline} ({digits(base)} s): {told}"
    return Chart(f"{name}-{what.replace(' ', '-')}", alt, 0.6 + 0.34 * len(ordered), draw)


def _label_bars(axes: Any, names: list[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _grid(axes: Any, theme: Theme) -> None:
    axes.grid(color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)
