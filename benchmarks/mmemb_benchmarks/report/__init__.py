"""One self-contained page, and its charts as PNGs, from the results of benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmemb_benchmarks.report.page import render
from mmemb_benchmarks.results import read_results
from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import write_whole

PAGE = "index.html"


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
