"""The page: what the results say, in the order in which a reader asks, and its charts as PNGs beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmemb_benchmarks.measure.frontier import FrontierResult
from mmemb_benchmarks.measure.latency import LatencyResult
from mmemb_benchmarks.measure.load import LoadResult
from mmemb_benchmarks.peers.contest import PeersResult
from mmemb_benchmarks.report import charts
from mmemb_benchmarks.results import KINDS, Stamped, digits, read_results
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation.theme import DARK, LIGHT
from mmemb_deploy.files import write_whole

PAGE = "index.html"
FIGURES = "embed x1", "embed x8", "token x1", "token x8", "think and embed x1", "think and embed x8"


def write_report(sources: Sequence[Path], folder: Path) -> tuple[Path, list[Path]]:
    """Write `index.html` and its charts into a folder, which is made; return the page and the files passed over.

    Nothing is written, and OptionError raised, where a source cannot be read or none is there.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--out is {folder}: it is a file; name a folder")
    results, passed_over = read_results(sources)
    page, pictures = render(results)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        write_whole(folder / name, content)
    write_whole(folder / PAGE, page)
    return folder / PAGE, passed_over


def render(results: Sequence[Stamped[Any]]) -> tuple[str, dict[str, bytes]]:
    """Return the page, and its charts as PNG by file name."""
    subjects = _subjects(results)
    drawn = {subject["slug"]: list(_charts(subject)) for subject in subjects}
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


def _subjects(results: Iterable[Stamped[Any]]) -> list[dict[str, Any]]:
    """Return the results by subject, which is a bundle on a backend, or the peers of one run.

    A subject has a title, a slug, its results, and each of them by its kind, None where it is not there.
    """
    grouped: dict[str, dict[str, Stamped[Any]]] = {}
    for result in results:
        title = result.bundle and f"{result.bundle.name}, {result.bundle.precision}, {result.bundle.backend}"
        if isinstance(result.result, PeersResult):
            title = f"the same weights elsewhere: {result.result.tokens} tokens, {result.result.threads} threads"
        grouped.setdefault(title or "a bundle", {})[result.kind] = result
    return [
        {
            "title": title,
            "slug": re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
            "results": list(kinds.values()),
            **dict.fromkeys(KINDS),
            **kinds,
        }
        for title, kinds in sorted(grouped.items(), key=lambda item: -len(item[1]))
    ]


def _charts(subject: dict[str, Any]) -> Iterable[charts.Chart]:
    slug: str = subject["slug"]
    for stamped in subject["results"]:
        result = stamped.result
        if isinstance(result, LatencyResult):
            yield charts.latency_chart(slug, result)
            yield charts.stages_chart(slug, result)
        elif isinstance(result, FrontierResult):
            yield charts.frontier_chart(slug, result)
        elif isinstance(result, LoadResult):
            yield charts.load_chart(slug, result)
        elif isinstance(result, PeersResult):
            there = result.peers[result.baseline].seconds
            yield from (charts.peers_chart(slug, result, what) for what in FIGURES if what in there)
