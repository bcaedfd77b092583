"""The charts of a report: drawn by matplotlib, small enough for a phone, once for each theme."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from mmemb_benchmarks.measure.frontier import FrontierResult
from mmemb_benchmarks.measure.latency import LatencyResult
from mmemb_benchmarks.measure.load import LoadResult
from mmemb_benchmarks.peers.contest import PeersResult
from mmemb_benchmarks.results import digits
from mmemb_benchmarks.timing import STAGES
from mmemb_deploy.evaluation.theme import LIGHT, Theme, drawing

WIDTH = 4.8  # inches
MODES = "never", "auto", "always"

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
        return (
            "data:image/svg+xml;base64," + base64.b64encode(self._save(theme, "svg", metadata={"Date": None})).decode()
        )

    def png(self) -> bytes:
        """Return the drawing on white."""
        return self._save(LIGHT, "png", dpi=200)

    def _save(self, theme: Theme, kind: str, **options: Any) -> bytes:
        # without a salt and a date, the same figures give the same bytes
        with drawing(WIDTH, self.height, theme, **{"svg.hashsalt": self.name}) as figure:
            figure.set_layout_engine("constrained")
            axes = figure.add_subplot()
            axes.spines[:].set_visible(False)
            self.draw(axes, theme)
            saved = io.BytesIO()
            figure.savefig(saved, format=kind, **options)
            return saved.getvalue()


def latency_chart(name: str, latency: LatencyResult) -> Chart:
    """Draw the median of every mode as a bar, and its 95th percentile as a mark."""

    def draw(axes: Any, theme: Theme) -> None:
        widest = max(latency.modes[mode].p95_ms for mode in MODES)
        for line, mode in enumerate(MODES):
            times, colour = latency.modes[mode], theme.modes[mode]
            axes.barh(line, times.p50_ms, height=0.55, color=colour)
            axes.plot([times.p50_ms, times.p95_ms], [line, line], color=colour, linewidth=1.5, zorder=0)
            axes.plot([times.p95_ms] * 2, [line - 0.16, line + 0.16], color=colour, linewidth=2)
            shown = f"{digits(times.p50_ms)} / {digits(times.p95_ms)}"
            axes.text(times.p95_ms + 0.02 * widest, line, shown, va="center")
        axes.set_xlim(0, 1.35 * widest)
        _label_bars(axes, MODES, "ms alone: bar the median, mark the 95th percentile")

    told = "; ".join(
        f"{mode} {digits(times.p50_ms)} ms, p95 {digits(times.p95_ms)} ms" for mode, times in latency.modes.items()
    )
    return Chart(f"{name}-latency", f"Median latency of a request alone: {told}", 1.9, draw)


def stages_chart(name: str, latency: LatencyResult) -> Chart:
    """Draw where each mode's mean time goes."""

    def draw(axes: Any, theme: Theme) -> None:
        longest = max(latency.modes[mode].mean_ms for mode in MODES)
        for line, mode in enumerate(MODES):
            left = 0.0
            for stage in STAGES:
                width = latency.modes[mode].stages_ms.get(stage, 0.0)
                label = None if line else stage
                axes.barh(line, width, left=left, height=0.55, color=theme.stages[stage], label=label)
                left += width
            axes.text(left + 0.02 * longest, line, digits(left), va="center")
        axes.set_xlim(0, 1.15 * longest)
        _label_bars(axes, MODES, "mean ms of a request alone")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, handlelength=1.1, fontsize=9)

    told = "; ".join(
        f"{mode}: " + ", ".join(f"{stage} {digits(milliseconds)}" for stage, milliseconds in times.stages_ms.items())
        for mode, times in latency.modes.items()
    )
    return Chart(f"{name}-stages", f"Mean milliseconds by stage: {told}", 2.4, draw)


def frontier_chart(name: str, frontier: FrontierResult) -> Chart:
    """Draw quality over latency as the gate's threshold falls, between lots and hindsight."""
    chosen, last = frontier.default, frontier.curve[-1]

    def draw(axes: Any, theme: Theme) -> None:
        lines = (
            (frontier.oracle, "hindsight (oracle)", theme.quiet, ":", 1.6),
            (frontier.random, "drawing lots", theme.modes["never"], "--", 1.6),
            (frontier.curve, "the gate", theme.modes["auto"], "-", 2.2),
        )
        for points, label, colour, style, width in lines:
            milliseconds, hits = zip(*((point.latency_ms, point.hit_at_1) for point in points), strict=True)
            axes.plot(milliseconds, hits, style, color=colour, label=label, linewidth=width)
        at = chosen.latency_ms, chosen.hit_at_1
        axes.plot(*at, "o", color=theme.modes["auto"], markersize=8, zorder=5)
        axes.annotate(f"default: {chosen.reasoning_rate:.0%} reason", at, (10, -16), textcoords="offset points")
        _grid(axes, theme)
        axes.set_xlabel("mean ms of a query alone")
        axes.set_ylabel("hit@1")
        axes.legend(loc="lower right")

    told = (
        f"the default reaches {chosen.hit_at_1:.3f} at {digits(chosen.latency_ms)} ms; "
        f"with all reasoning it is {last.hit_at_1:.3f} at {digits(last.latency_ms)} ms"
    )
    return Chart(f"{name}-frontier", f"hit@1 against mean latency over the gate's threshold: {told}", 3.2, draw)


def load_chart(name: str, load: LoadResult) -> Chart:
    """Draw the 95th percentile over the rate of arrivals, the better where one was tried twice, and the target."""
    target = digits(load.target_p95_ms)

    def draw(axes: Any, theme: Theme) -> None:
        for mode, found in load.modes.items():
            best: dict[float, float] = {}
            for trial in found.trials:
                best[trial.rate_per_s] = min(trial.p95_ms, best.get(trial.rate_per_s, trial.p95_ms))
            axes.plot(*zip(*best.items(), strict=True), "o-", color=theme.modes[mode], label=mode, markersize=4, lw=1.8)
        axes.axhline(load.target_p95_ms, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        # beside the axes, where no line runs under it
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"target\n{target} ms", (1, load.target_p95_ms), (4, 0), **at)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        _grid(axes, theme)
        axes.set_xlim(left=0)
        axes.set_xlabel("arrivals a second")
        axes.set_ylabel("p95, ms")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    told = "; ".join(f"{mode} {digits(found.sustainable_per_s)}" for mode, found in load.modes.items())
    alt = f"Sustained requests a second with p95 below {target} ms: {told}"
    return Chart(f"{name}-load", alt, 3.0, draw)


def peers_chart(name: str, peers: PeersResult, what: str) -> Chart:
    """Draw how many times faster than the baseline each peer does one thing."""
    base = peers.peers[peers.baseline].seconds[what]
    ratios = {peer: base / found.seconds[what] for peer, found in peers.peers.items() if what in found.seconds}
    ordered = dict(sorted(ratios.items(), key=lambda item: item[1]))
    widest = max(ratios.values())

    def draw(axes: Any, theme: Theme) -> None:
        for line, (peer, ratio) in enumerate(ordered.items()):
            axes.barh(line, ratio, height=0.6, color=theme.modes["never" if peer == peers.baseline else "auto"])
            axes.text(ratio + 0.02 * widest, line, f"{ratio:.2f}x", va="center")
        axes.set_xlim(0, 1.3 * widest)
        axes.margins(y=0.02)
        axes.set_yticks(range(len(ordered)), list(ordered))
        axes.set_xticks([])

    told = "; ".join(f"{peer} {ratio:.2f}" for peer, ratio in reversed(ordered.items()))
    alt = f"{what}, times faster than {peers.baseline} ({digits(base)} s): {told}"
    return Chart(f"{name}-{what.replace(' ', '-')}", alt, 0.6 + 0.34 * len(ordered), draw)


def _label_bars(axes: Any, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(label)


def _grid(axes: Any, theme: Theme) -> None:
    axes.grid(color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)
