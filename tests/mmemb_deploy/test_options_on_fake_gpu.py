"""What `mmemb build` can be asked for beside shapes, on a GPU that is not there: see `test_on_fake_gpu`.

A build compares its engines with the bundle's reference, so that those that compute something else are refused.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemb_deploy import Embedder
from mmemb_deploy.backends.tensorrt import api
from mmemb_deploy.backends.tensorrt import engine as engine_module
from mmemb_deploy.backends.tensorrt.budget import budget_of
from mmemb_deploy.backends.tensorrt.files import read_sets
from mmemb_deploy.backends.tensorrt.network import Network
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.cli.main import application
from mmemb_deploy.errors import BackendError, CertificateError, IntegrityError, OptionError
from mmemb_deploy.options import EncodeOptions

pytestmark = pytest.mark.no_gpu

PlugIn = Callable[..., AbstractContextManager[Any]]
ROUTES: list[EncodeOptions] = [{"reasoning": "never"}, {"reasoning": "always"}]
TEXTS = ["three plus four", "a much longer text, which needs many more tokens than its neighbours do", "one"]


def build(folder: Path, *asked: str) -> None:
    """Build and verify engines for the texts, all in one batch."""
    (folder.parent / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    shapes = ["--batch", str(len(TEXTS)), "--traffic", str(folder.parent / "texts.jsonl")]
    application()(["build", str(folder), *shapes, *asked], standalone_mode=False)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "bundle"))


def agrees(folder: Path, reference: Embedder) -> bool:
    """Whether the engines in a folder give the reference's embeddings, of a padded batch and of what follows it."""
    loaded = Embedder.load(folder, backend="tensorrt")
    return all(np.allclose(loaded.encode(TEXTS, **way), reference.encode(TEXTS, **way), atol=2e-5) for way in ROUTES)


def weights_of(folder: Path, graph: str) -> Path:
    return folder / f"{graph}.onnx.data"


@pytest.fixture(scope="module")
def stripped(plug_in: PlugIn, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bundle` with engines that lack their weights."""
    folder = copied(tiny_bundle, tmp_path_factory.mktemp("stripped"))
    with plug_in():
        build(folder, "--strip")
    return folder


def test_stripped_engines_take_their_weights_from_the_bundle(gpu: Any, stripped: Path, tiny_embedder: Embedder) -> None:
    assert agrees(stripped, tiny_embedder)
    assert gpu.counts["runs"] > 0
    weights = sum(path.stat().st_size for path in stripped.glob("*.onnx.data"))
    assert sum(path.stat().st_size for path in stripped.glob("engines/*/*.engine")) < weights
    (found,) = read_sets(Bundle.open(stripped))
    assert found.certificate is not None


def test_stripped_engines_are_counted_with_what_fills_them(plug_in: PlugIn, stripped: Path) -> None:
    opened = Bundle.open(stripped)
    (found,) = read_sets(opened)
    vision = budget_of(opened.manifest, found).weights["vision"]
    assert vision > weights_of(stripped, "vision").stat().st_size
    with (
        plug_in(total=vision - 1),
        pytest.raises(BackendError, match=r"the engine of vision.onnx needs .* of GPU memory"),
    ):
        Embedder.load(stripped, backend="tensorrt")


def test_a_stripped_engine_that_nobody_filled_does_not_run(
    gpu: Any, stripped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "refit_engine", lambda *_: None)
    with pytest.raises(import_module("fakegpu").MisuseError, match="which was never filled with"):
        Embedder.load(stripped, backend="tensorrt")
    gpu.misuses.clear()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("content", "why"), [(None, "is missing"), (b"others", "was changed")])
def test_weights_that_are_not_those_of_the_build_are_refused(
    content: bytes | None, why: str, stripped: Path, tmp_path: Path
) -> None:
    def spoil(path: Path) -> None:
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    folder = copied(stripped, tmp_path)
    opened = Bundle.open(folder)
    spoil(weights_of(folder, "vision"))
    with pytest.raises(IntegrityError, match=rf"onnx\.data {why}"):
        Embedder.load(folder, backend="tensorrt")
    with pytest.raises(BackendError, match=r"cannot fill the stripped engine .* with the weights of .*: Failed to"):
        Embedder.of_bundle(opened, backend="tensorrt")
    shutil.copy(weights_of(stripped, "vision"), folder)
    spoil(next(folder.glob("engines/*/*.onnx")))
    with pytest.raises(BackendError, match=rf"\.onnx {why}: run: mmemb build"):
        Embedder.load(folder, backend="tensorrt")


def test_a_bundle_of_engines_alone_has_nothing_to_fill_stripped_ones_with(
    gpu: Any, stripped: Path, tmp_path: Path
) -> None:
    target = tmp_path / "alone"
    with pytest.raises(OptionError, match=r"stripped engines need the bundle.s weights; leave --strip out"):
        build(copied(stripped, tmp_path), "--strip", "--engines-only", str(target))
    assert not target.exists()
    assert "deserialized" not in gpu.counts


def distrusting(library: api.Library, name: str, plan: Any, *, host_code: bool) -> Any:
    assert host_code
    return api.load_engine(library, name, plan)


def test_version_compatible_engines_run_on_the_next_release_and_plain_ones_do_not(
    plug_in: PlugIn, tiny_bundle: Path, tmp_path: Path, tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_bundle, tmp_path)
    with plug_in():
        build(folder, "--version-compatible")
        assert agrees(folder, tiny_embedder)
    with plug_in(version="10.17.0") as gpu:
        assert agrees(folder, tiny_embedder)
        assert gpu.counts["runs"] > 0
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "load_engine", distrusting)
            with pytest.raises(BackendError, match=r"cannot load the engine .*engine_host_code_allowed is not set"):
                Embedder.load(folder, backend="tensorrt")
    with plug_in():
        build(folder)
    with plug_in(version="10.17.0"), pytest.raises(BackendError, match=r"no engines for .* with tensorrt 10\.17\.0"):
        Embedder.load(folder, backend="tensorrt")


def test_attention_by_lengths_gives_every_row_of_a_padded_batch_its_own(
    plug_in: PlugIn, tiny_bundle: Path, tmp_path: Path, tiny_embedder: Embedder
) -> None:
    folder = copied(tiny_bundle, tmp_path)
    with plug_in(version="11.4.0") as gpu:
        build(folder, "--attention", "lengths")
        assert agrees(folder, tiny_embedder)
        assert gpu.counts["runs_decoder"] > 0


def causal_alone(network: Any, _: str) -> None:
    for attention, _ in network._attentions():
        attention.causal_kind = import_module("tensorrt").CausalMaskKind.LOWER_RIGHT


@pytest.mark.parametrize("set_lengths", [lambda *_: None, causal_alone], ids=["nothing", "causality alone"])
def test_attention_without_its_lengths_is_seen_by_the_check(
    set_lengths: Callable[..., None],
    plug_in: PlugIn,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Network, "_attend_by_lengths", set_lengths)
    with plug_in(version="11.4.0"), pytest.raises(CertificateError, match="cosine"):
        build(copied(tiny_bundle, tmp_path), "--attention", "lengths")


@pytest.mark.usefixtures("gpu")
def test_releases_that_do_not_read_lengths_are_not_asked_to(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_bundle, tmp_path)
    with pytest.raises(OptionError, match=r"tensorrt 10\.16\.1 does not read lengths together with a causal mask"):
        build(folder, "--attention", "lengths")
    monkeypatch.setitem(api.LENGTHS_SINCE, api.TENSORRT, (10, 16))
    with pytest.raises(AttributeError, match="CausalMaskKind"):
        build(folder, "--attention", "lengths")
