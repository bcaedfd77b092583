"""No command of the documentation brings both builds of ONNX Runtime, which would overwrite each other's files."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
BUILDS = {"onnxruntime", "onnxruntime-gpu"}
WRITTEN = re.compile(r"(?:mmemb-deploy|\.)\[([a-z0-9-]+(?:,[a-z0-9-]+)*)\]")


def documented() -> Iterator[frozenset[str]]:
    """Yield the extras that are named together in a page, a docstring, a script or a Makefile."""
    places = [*ROOT.glob("*.md"), ROOT / "Makefile"]
    for folder in ("docs/pages", "examples", "benchmarks", "engines"):
        places += [path for kind in ("*.md", "*.py", "*.sh", "Containerfile") for path in (ROOT / folder).rglob(kind)]
    for path in places:
        for found in WRITTEN.findall(path.read_text(encoding="utf-8")):
            yield frozenset(found.split(","))


DOCUMENTED = sorted({extras for extras in documented() if extras <= EXTRAS.keys()}, key=sorted)


def brought(wanted: list[str]) -> set[str]:
    """Return the names of the packages that requirements bring, those of packages that are installed here included."""
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(each) for each in wanted]
    while left:
        requirement = left.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        chosen = ["", *extras]
        left += [
            each
            for each in needs(name)
            if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in chosen)
        ]
    return {name for name, _ in seen}


@cache
def needs(name: str) -> list[Requirement]:
    """Return what a package that is installed here requires."""
    try:
        return [Requirement(each) for each in requires(name) or []]
    except PackageNotFoundError:  # of another platform, or onnxruntime-gpu, which needs no onnxruntime
        return []


@pytest.mark.parametrize("extras", DOCUMENTED, ids=lambda extras: "-".join(sorted(extras)))
def test_a_documented_command_brings_one_onnx_runtime_at_most(extras: frozenset[str]) -> None:
    packages = brought([*PROJECT["dependencies"], *(each for extra in extras for each in EXTRAS[extra])])
    chosen = {name for name in ("cpu", "gpu") if name in extras}
    assert packages & BUILDS == {{"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}[name] for name in chosen}
    assert len(chosen) <= 1
    assert chosen or not extras & {"export", "bench", "eval", "remote"}, "these run bundles, which takes one of the two"


def test_only_two_extras_bring_an_onnx_runtime() -> None:
    assert {extra for extra, packages in EXTRAS.items() if brought(packages) & BUILDS} == {"cpu", "gpu"}


def test_the_documentation_names_extras_together() -> None:
    assert {"export", "cpu"} <= set().union(*DOCUMENTED)
    assert any({"cpu", "tensorrt", "export"} <= extras for extras in DOCUMENTED)
    assert any({"gpu", "export"} <= extras for extras in DOCUMENTED)


def test_a_gpu_s_libraries_come_with_its_onnx_runtime() -> None:
    (runtime,) = [each for each in map(Requirement, EXTRAS["gpu"]) if each.name == "onnxruntime-gpu"]
    assert runtime.extras == {"cuda", "cudnn"}
