"""The Containerfile is not built here; it copies what is there, installs known extras and runs known commands."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from mmemb_deploy.cli.main import application

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The instructions and their arguments, a continued line as one."""
    lines = [line for line in (ROOT / "engines" / "Containerfile").read_text().splitlines() if line[:1] != "#"]
    whole = "\n".join(lines).replace("\\\n", " ").split("\n")
    return [(name, arguments) for name, _, arguments in (line.partition(" ") for line in whole if line)]


def of(steps: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for instruction, arguments in steps if instruction == name]


def test_it_copies_every_package_of_the_wheel_and_what_builds_it(steps: list[tuple[str, str]]) -> None:
    copied = {source for line in of(steps, "COPY") if "--from" not in line for source in line.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    packages = {Path(package).parts[0] for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert copied == packages | {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], "LICENSE"}


def test_it_installs_extras_without_torch(steps: list[tuple[str, str]]) -> None:
    (extras,) = [found for line in of(steps, "RUN") for found in re.findall(r"'\.\[([\w,-]+)\]'", line)]
    known = PROJECT["project"]["optional-dependencies"]
    needed = PROJECT["project"]["dependencies"] + [each for extra in extras.split(",") for each in known[extra]]
    assert not any(each.startswith(("torch", "transformers")) for each in needed)


def test_its_commands_are_known_and_its_user_is_not_root(steps: list[tuple[str, str]]) -> None:
    (entry,), (command,) = of(steps, "ENTRYPOINT"), of(steps, "CMD")
    shell, flag, script, zero = json.loads(entry)
    assert (shell, flag, zero) == ("/bin/sh", "-c", "mmemb")
    build, _, then = script.partition(" >&2 && ")
    assert then == 'exec "$@"'
    for words in (shlex.split(build.replace("$MMEMB_BATCH", "32")), json.loads(command)):
        program, name, *arguments = words
        assert program == "mmemb"
        known: Any = get_command(application())
        known.commands[name].make_context(name, arguments)  # a usage error raises
    assert of(steps, "USER")[-1].isdigit()
    assert of(steps, "USER")[-1] != "0"
