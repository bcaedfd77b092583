"""A copy of a portable bundle to build engines into, and TensorRT for RTX, which builds them without a GPU."""

import shutil
from pathlib import Path

import pytest

from mmemb_deploy.backends.tensorrt.api import TENSORRT_RTX, Library, load_library
from mmemb_deploy.bundle.folder import Bundle


@pytest.fixture(scope="session")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'mmemb-deploy[rtx]'")
    return load_library(TENSORRT_RTX)


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Bundle:
    """A bundle with portable graphs that a test may change."""
    return Bundle.open(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))
