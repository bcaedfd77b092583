"""The report is one page that needs nothing else, shows what it was given, and refuses what it cannot read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmemb_benchmarks.report.page import write_report
from mmemb_deploy import OptionError


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, make_results: Callable[[], dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for kind, content in make_results().items():
        (folder / f"{kind}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def whole(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all results, which takes seconds to draw."""
    page, passed_over = write_report([results], tmp_path_factory.mktemp("whole"))
    assert not passed_over
    return page


def test_the_page_shows_every_figure_and_refers_to_nothing_outside(whole: Path) -> None:
    html = whole.read_text()
    figures = "0.653 0.922 92.2% 19.5 2.31 0.617 0.99907 6.85 9.11 401 0.831 1.33 1f2e3d4c5b6a"
    for figure in figures.split():
        assert figure in html, figure
    assert "it needs &lt;a GPU&gt;" in html
    targets = re.findall(r"""(?:src|srcset|href)="([^"]*)""", html)
    assert targets
    assert all(target.startswith("data:image/svg+xml;base64,") for target in targets)
    assert not re.search(r"url\(|@import|<script", html)


def test_every_chart_is_drawn_for_both_themes_and_told_in_words(whole: Path) -> None:
    html = whole.read_text()
    pictures = re.findall(r"<picture>.*?</picture>", html, flags=re.DOTALL)
    assert len(pictures) == len(list(whole.parent.glob("*.png"))) == 5
    for picture in pictures:
        dark, light = re.findall(r'="(data:[^"]*)"', picture)
        assert dark != light
        assert re.search(r'alt="[^"]*\d', picture)


@pytest.mark.parametrize(
    ("kind", "title"),
    [("latency", "Latency"), ("load", "What a server sustains"), ("overload", "Beyond what it sustains")],
)
def test_a_section_is_there_with_its_result_alone(results: Path, tmp_path: Path, kind: str, title: str) -> None:
    page, _ = write_report([results / f"{kind}.json"], tmp_path / "with")
    assert f"<h3>{title}</h3>" in page.read_text()
    page, _ = write_report([results / "peers.json", results / "suite.json"], tmp_path / "without")
    assert f"<h3>{title}</h3>" not in page.read_text()


def test_what_is_not_a_whole_result_is_refused_and_nothing_is_written(results: Path, tmp_path: Path) -> None:
    broken = json.loads((results / "load.json").read_text())
    del broken["result"]["modes"]["auto"]["trials"]
    (tmp_path / "load.json").write_text(json.dumps(broken))
    with pytest.raises(OptionError, match=r"load\.json is not a whole result: .*modes\.auto\.trials"):
        write_report([results, tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="does not exist"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(OptionError, match="it is a file; name a folder"):
        write_report([results], tmp_path / "load.json")


def test_other_results_of_a_folder_are_passed_over_and_named_ones_refused(results: Path, tmp_path: Path) -> None:
    other = tmp_path / "ablation.json"
    other.write_text('{"kind": "ablation"}')
    assert write_report([results / "suite.json", tmp_path], tmp_path / "out")[1] == [other]
    with pytest.raises(OptionError, match=r"ablation\.json is a result of kind 'ablation'"):
        write_report([other], tmp_path / "out")
    with pytest.raises(OptionError, match="no result of latency, frontier"):
        write_report([tmp_path], tmp_path / "out")


def test_other_files_of_the_folder_stay(results: Path, tmp_path: Path) -> None:
    kept = tmp_path / "notes.txt"
    kept.write_text("mine")
    write_report([results / "suite.json"], tmp_path)
    assert kept.read_text() == "mine"
