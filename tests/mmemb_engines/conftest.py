"""A copy of a portable bundle to build engines into, and TensorRT for RTX, which builds them without a GPU."""

import shutil
from pathlib import Path

import pytest

from mmemb_deploy.backends.tensorrt.api import TENSORRT_RTX, Library, load_library
from mmemb_deploy.backends.tensorrt.files import EngineSet, read_sets
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle.folder import Bundle
from mmemb_engines import build, check, profiles
from mmemb_engines.watch import Silent


@pytest.fixture(scope="session")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'mmemb-deploy[rtx]'")
    return load_library(TENSORRT_RTX)


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Bundle:
    """A bundle with portable graphs that a test may change."""
    return Bundle.open(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))


def first_profile(patch: pytest.MonkeyPatch) -> None:
    every = profiles.profiles
    for module in (build, check):
        patch.setattr(module, "profiles", lambda *arguments: every(*arguments)[:1])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build every engine for the first of its profiles alone: each of them takes a second."""
    first_profile(monkeypatch)


@pytest.fixture(scope="session")
def once_built(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, rtx: Library) -> Path:
    """A bundle whose engines are built for sm89, in batches of 2."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    opened, options = Bundle.open(folder), BuildOptions()
    with pytest.MonkeyPatch.context() as patch:
        first_profile(patch)
        _, (device,) = build.device_sets(opened, TENSORRT_RTX, ("sm89",), options)
        demand = profiles.demand_of_limits(opened.manifest, 2)
        build.build_engines(opened, rtx, device, demand, options, lambda _: Silent())
    return folder


@pytest.fixture
def built(tmp_path: Path, once_built: Path) -> tuple[Bundle, EngineSet]:
    """A copy of `once_built` and the engines in it, that a test may change."""
    opened = Bundle.open(Path(shutil.copytree(once_built, tmp_path / "built")))
    return opened, next(read_sets(opened))
