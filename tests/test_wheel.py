"""The wheel holds the five packages and the nano bundle, and its demo runs in an environment without torch."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGES = (
    "mmemb_deploy",
    "training/mmemb_training",
    "export/mmemb_export",
    "engines/mmemb_engines",
    "benchmarks/mmemb_benchmarks",
)
OTHERS = {"optimum/commands/register/register_mmemb.py"}  # in a namespace that optimum leaves open
DIST_INFO = {f"mmemb_deploy-0.2.0.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")} | {
    "mmemb_deploy-0.2.0.dist-info/licenses/LICENSE"
}
SIZE_LIMIT = 16_000_000  # bytes; the embedded bundle is nearly all of it

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command as a user's shell would, away from this checkout; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; return its folder of programs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    run(
        programs / "python",
        "-m",
        "pip",
        "install",
        "--no-compile",
        "-c",
        CONSTRAINTS,
        f"{wheel}[cpu,bench]",
        cwd=folder,
    )
    return programs


def expected_files() -> set[str]:
    """The wheel's names for the packages' modules, recipes, templates, settings and pages, and the embedded bundle."""
    names: set[str] = set()
    for package in map(Path, PACKAGES):
        kinds = "*.py", "*.toml", "*.ini", "*.j2", "*.html", "py.typed"
        files = [file for kind in kinds for file in (ROOT / package).rglob(kind)]
        names |= {file.relative_to(ROOT / package.parent).as_posix() for file in files}
    bundle = ROOT / "mmemb_deploy" / "assets" / "nano"
    return names | {file.relative_to(ROOT).as_posix() for file in bundle.rglob("*") if file.is_file()}


def test_it_holds_the_packages_the_nano_bundle_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names == expected_files() | OTHERS | DIST_INFO
    assert "mmemb_deploy/assets/nano/manifest.json" in names


def test_it_is_small_enough_to_embed_the_bundle(wheel: Path) -> None:
    assert wheel.stat().st_size < SIZE_LIMIT


def test_the_runtime_installs_without_torch_and_transformers(installed: Path, tmp_path: Path) -> None:
    program = """
from importlib.util import find_spec
import mmemb_deploy
print(mmemb_deploy.__file__)
print([name for name in ("torch", "transformers") if find_spec(name)])
"""
    where, heavy = run(installed / "python", "-I", "-c", program, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert heavy == "[]"


def test_the_demo_draws_its_picture(installed: Path, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    run(installed / "mmemb", "demo", "--output", picture, cwd=tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
