"""The page: what the results say, in the order in which a reader asks, and its charts as PNGs beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmemb_benchmarks.measure.frontier import FrontierResult
from mmemb_benchmarks.measure.latency import LatencyResult
from mmemb_benchmarks.measure.load import LoadResult
from mmemb_benchmarks.peers.contest import PeersResult
from mmemb_benchmarks.report import charts
from mmemb_benchmarks.results import Benchmark, Stamped, digits, read_results
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.theme import DARK, LIGHT
from mmemb_deploy.files import write_whole

PAGE = "index.html"
FIGURES = "embed x1", "embed x8", "token x1", "token x8", "think and embed x1", "think and embed x8"


@dataclass(frozen=True)
class Subject:
    """One bundle on one backend, or the peers of one run, with its results by kind."""

    title: str
    slug: str
    latency: Stamped[LatencyResult] | None = None
    frontier: Stamped[FrontierResult] | None = None
    load: Stamped[LoadResult] | None = None
    peers: Stamped[PeersResult] | None = None
    suite: Stamped[list[Benchmark]] | None = None

    @property
    def results(self) -> list[Stamped[Any]]:
        """The results that are there."""
        found = (self.latency, self.frontier, self.load, self.peers, self.suite)
        return [result for result in found if result is not None]


def write_report(sources: Sequence[Path], folder: Path) -> tuple[Path, list[Path]]:
    """Write `index.html` and its charts into a folder, which is made; return the page and the files passed over.

    Nothing is written, and OptionError raised, where a source cannot be read or none is there.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--out is {folder}: it is a file; name a folder")
    results, passed_over = read_results(sources)
    page, charts = render(results)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in charts.items():
        write_whole(folder / name, content)
    write_whole(folder / PAGE, page)
    return folder / PAGE, passed_over


def render(results: Sequence[Stamped[Any]]) -> tuple[str, dict[str, bytes]]:
    """Return the page, and its charts as PNG by file name."""
    subjects = _subjects(results)
    drawn = {subject.slug: list(_charts(subject)) for subject in subjects}
    environment = Environment(
        loader=PackageLoader("mmemb_benchmarks.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["digits"] = digits
    page = environment.get_template("page.html.j2").render(
        subjects=subjects,
        charts={slug: {chart.name.removeprefix(f"{slug}-"): chart for chart in each} for slug, each in drawn.items()},
        dates=sorted({result.date for result in results}),
        machines=sorted({result.machine.device for result in results}),
        figures=FIGURES,
        light=LIGHT,
        dark=DARK,
        modes=charts.MODES,
    )
    return page, {f"{chart.name}.png": chart.png() for each in drawn.values() for chart in each}


def _subjects(results: Iterable[Stamped[Any]]) -> list[Subject]:
    grouped: dict[str, dict[str, Any]] = {}
    for result in results:
        title = result.bundle and f"{result.bundle.name}, {result.bundle.precision}, {result.bundle.backend}"
        if isinstance(result.result, PeersResult):
            title = f"the same weights elsewhere: {result.result.tokens} tokens, {result.result.threads} threads"
        grouped.setdefault(title or "a bundle", {})[result.kind] = result
    ordered = sorted(grouped.items(), key=lambda item: -len(item[1]))
    return [Subject(title, re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"), **kinds) for title, kinds in ordered]


def _charts(subject: Subject) -> Iterable[charts.Chart]:
    if subject.latency:
        yield charts.latency_chart(subject.slug, subject.latency.result)
        yield charts.stages_chart(subject.slug, subject.latency.result)
    if subject.frontier:
        yield charts.frontier_chart(subject.slug, subject.frontier.result)
    if subject.load:
        yield charts.load_chart(subject.slug, subject.load.result)
    if subject.peers:
        peers = subject.peers.result
        there = peers.peers[peers.baseline].seconds
        yield from (charts.peers_chart(subject.slug, peers, what) for what in FIGURES if what in there)
