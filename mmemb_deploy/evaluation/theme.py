"""The colours and the frame of every picture that the project draws."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmemb_deploy.errors import MissingExtraError


@dataclass(frozen=True)
class Theme:
    """Colours on a background; those of the modes stay apart for colour-blind eyes too."""

    ink: str
    quiet: str
    line: str
    paper: str
    modes: dict[str, str]
    stages: dict[str, str]
    series: tuple[str, ...]  # for what has no colour of its own, in this order
    right: str
    wrong: str


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
    series=("#0b6e99", "#d9730d", "#8592a0", "#5f7d4e", "#8c5e8f"),
    right="#2f855a",
    wrong="#c53030",
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
    series=("#4db5de", "#f2994a", "#9aa5b1", "#8fb37a", "#c08fc4"),
    right="#68d391",
    wrong="#fc8181",
)


@contextmanager
def drawing(width: float, height: float, theme: Theme = LIGHT, **settings: Any) -> Generator[Any]:
    """Yield a matplotlib Figure of that many inches in a theme, to be drawn on and saved inside the block.

    `settings` are matplotlib's own. Raises MissingExtraError without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "bench") from error
    style: Any = {
        "font.size": 10,
        "font.family": "sans-serif",
        "text.color": theme.ink,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.quiet,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "xtick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
    }
    with rc_context(style | settings):
        yield Figure(figsize=(width, height), facecolor=theme.paper)
