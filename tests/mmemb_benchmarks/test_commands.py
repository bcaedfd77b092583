"""Every command takes its bundle, its engine and its output in the same way, and still takes what it took."""

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mmemb_benchmarks import commands
from mmemb_benchmarks.mmeb_v2 import commands as mmeb_v2
from mmemb_deploy import OptionError
from mmemb_deploy.errors import BundleError

OF_A_BUNDLE = (
    "digitchain",
    "frontier",
    "latency",
    "load",
    "overload",
    "simulate",
    "suite",
    "startup",
    "runtime",
    "overlap",
    "memory",
)


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    commands.register(made)
    mmeb_v2.register(made)
    return made


def options_by_command(group: Any, path: str = "") -> dict[str, set[str]]:
    """Return what every command takes: options by their first name, arguments by theirs."""
    if not hasattr(group, "commands"):
        return {path: {name for parameter in group.params for name in parameter.opts}}
    return {
        name: options
        for key, command in group.commands.items()
        for name, options in options_by_command(command, f"{path} {key}".strip()).items()
    }


def failure(app: typer.Typer, *words: object) -> BaseException | None:
    return CliRunner().invoke(app, list(map(str, words))).exception


def test_a_command_that_runs_a_bundle_takes_it_first_with_its_engine_and_what_it_writes(app: typer.Typer) -> None:
    options = options_by_command(typer.main.get_command(app))
    of_a_bundle = {f"bench {name}" for name in OF_A_BUNDLE} | {"demo", "eval mmeb-v2"}
    assert {name for name, taken in options.items() if "bundle" in taken} == of_a_bundle
    for name in of_a_bundle:
        assert options[name] >= {"bundle", "--backend", "--threads", "--out"}, name
    assert options.keys() - of_a_bundle == {"bench peers", "bench search", "bench report", "bench compare"}


@pytest.mark.parametrize("given", [["{}"], ["--bundle", "{}"], ["--bundle={}"]], ids=["first", "option", "joined"])
@pytest.mark.parametrize("name", [*OF_A_BUNDLE, "demo"])
def test_a_bundle_is_an_argument_and_may_still_be_an_option(
    app: typer.Typer, tmp_path: Path, name: str, given: list[str]
) -> None:
    absent = tmp_path / "absent"
    words = [word.format(absent) for word in given]
    failed = failure(app, *(["demo"] if name == "demo" else ["bench", name]), *words)
    assert isinstance(failed, BundleError)
    assert str(absent) in str(failed)


@pytest.mark.parametrize("option", ["--out", "--output", "--output="])
def test_the_demo_writes_to_out(app: typer.Typer, tmp_path: Path, option: str) -> None:
    target = tmp_path / "demo.jpeg"
    words = [f"{option}{target}"] if option.endswith("=") else [option, target]
    failed = failure(app, "demo", *words)
    assert isinstance(failed, OptionError)
    assert f"--out is {target}: it must be a .png file" in str(failed)


def test_an_engine_whose_graphs_are_not_timed_is_refused(app: typer.Typer) -> None:
    failed = failure(app, "bench", "runtime", "--backend", "tensorrt")
    assert "backend whose graphs are timed 'tensorrt' is not known" in str(failed)
