"""A bundle without graphs: what it holds, what it refuses, and that its engines are still held to their hashes."""

from pathlib import Path

import pytest

from mmemb_deploy.backends.onnxruntime import OnnxRuntime
from mmemb_deploy.backends.tensorrt.files import EngineSet, find_set, graph_hash, read_engine
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError, IntegrityError, OptionError
from mmemb_deploy.evaluation.parity import REFERENCE, reference_of
from mmemb_deploy.preparer import row_encoder
from mmemb_engines.build import built_here
from mmemb_engines.engines_only import write_engines_only

Built = tuple[Bundle, EngineSet]


@pytest.fixture
def alone(built: Built, tmp_path: Path) -> Bundle:
    """A bundle of engines alone."""
    bundle, engines = built
    return write_engines_only(bundle, [engines], tmp_path / "alone")


def test_it_holds_engines_and_all_but_graphs_and_weights(built: Built, alone: Bundle) -> None:
    bundle, engines = built
    names = {path.name for path in alone.folder.rglob("*") if path.is_file()}
    assert names == {
        *("manifest.json", "tokenizer.json", REFERENCE, "engines.json", "modules.json", "config.json"),
        "config_sentence_transformers.json",
        *(each.file for each in engines.engines.values()),
    }
    assert Bundle.open(alone.folder).manifest == alone.manifest
    row_encoder(alone)
    assert len(reference_of(alone).probes) == len(reference_of(bundle).probes)


def test_its_engines_are_found_as_those_of_its_graphs(built: Built, alone: Bundle) -> None:
    bundle, engines = built
    assert find_set(alone, engines) == engines
    for name in bundle.manifest.graphs:
        assert graph_hash(alone, name) == graph_hash(bundle, name)
    other = dict.fromkeys(bundle.manifest.graphs, "0" * 64)
    changed = Bundle(alone.folder, alone.manifest.model_copy(update={"engines_of": other}))
    with pytest.raises(BackendError, match=r"the graph vision has changed .*: build and copy engines again from the b"):
        find_set(changed, engines)


def test_a_changed_engine_or_tokenizer_is_refused(built: Built, alone: Bundle) -> None:
    engines = built[1]
    engines.path(alone, "gate").write_bytes(b"another engine")
    with pytest.raises(BackendError, match=r"gate-.*engine was changed: build and copy engines again"):
        read_engine(alone, engines, "gate")
    (alone.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer.json was changed"):
        Bundle.open(alone.folder)


def test_onnx_runtime_and_another_build_say_that_the_graphs_are_not_there(alone: Bundle) -> None:
    message = "holds TensorRT engines without the graph vision: it runs on them alone, and neither ONNX Runtime nor"
    with pytest.raises(BackendError, match=message):
        OnnxRuntime().load(alone)
    with pytest.raises(BackendError, match=message):
        alone.graph("vision")


@pytest.mark.no_gpu
def test_its_engines_are_checked_where_there_is_a_gpu(alone: Bundle) -> None:
    with pytest.raises(BackendError, match="NVIDIA driver"):
        built_here(alone, "tensorrt-rtx")


def test_a_folder_that_exists_is_not_written_to(built: Built, tmp_path: Path) -> None:
    bundle, engines = built
    with pytest.raises(OptionError, match=r"--engines-only is .*, which exists: choose another folder"):
        write_engines_only(bundle, [engines], tmp_path)
