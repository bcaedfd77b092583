"""A bundle that was changed, broken or forged is refused, each fault by its own error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx.external_data_helper import set_external_data

from mmemb_deploy import BackendError, BundleError, CertificateError, Embedder, IntegrityError, SchemaError
from mmemb_deploy.bundle.folder import Bundle, file_hash
from mmemb_deploy.bundle.manifest import MANIFEST


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest in place."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_a_whole_bundle_opens(bundle: Path) -> None:
    assert Bundle.open(bundle).manifest.certificate is not None


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Embedder.load(tmp_path)


@pytest.mark.parametrize("name", ["gate.onnx", "decoder.onnx.data", "tokenizer.json"])
def test_one_flipped_byte_is_noticed(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{name} was changed"):
        Bundle.open(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"vision\.onnx is missing"):
        Bundle.open(bundle)


def test_a_newer_schema_names_the_version_that_reads_it(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(schema_version=4, written_by="9.1.0", new_key=1))
    with pytest.raises(SchemaError, match=r"has schema 4, this version reads 3: install mmemb-deploy 9\.1\.0 or newer"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["model"].pop("layers"), r"model\.layers: Field required"),
        (lambda manifest: manifest.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda manifest: manifest["gate"].update(threshold="high"), r"gate\.threshold: Input should be"),
        (lambda manifest: manifest["graphs"].pop("gate"), "describes no graph 'gate'"),
        (lambda manifest: manifest["files"].pop("gate.onnx"), r"lists no hash of gate\.onnx"),
    ],
)
def test_a_malformed_manifest_names_its_field(
    bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(bundle, change)
    with pytest.raises(SchemaError, match=message):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b'{"schema_version": "\xe9"}'])
def test_a_manifest_that_is_no_json_or_no_utf_8_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(SchemaError, match="the file: Invalid JSON"):
        Bundle.open(bundle)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, path: str) -> None:
    edit(bundle, lambda manifest: manifest["files"].update({path: "0" * 64}))
    with pytest.raises(IntegrityError, match="leaves the bundle"):
        Bundle.open(bundle)


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "gate.onnx").rename(tmp_path / "gate.onnx")
    (bundle / "gate.onnx").symlink_to(tmp_path / "gate.onnx")
    with pytest.raises(IntegrityError, match="is a link that leaves the bundle"):
        Bundle.open(bundle)


@pytest.mark.parametrize("location", ["../outside.data", "1_Pooling/../../outside.data", "link.data"])
def test_external_data_outside_the_bundle_is_refused(bundle: Path, tmp_path: Path, location: str) -> None:
    shutil.copy(bundle / "decoder.onnx.data", tmp_path / "outside.data")
    (bundle / "link.data").symlink_to(tmp_path / "outside.data")
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            places = {entry.key: entry.value for entry in tensor.external_data}
            tensor.raw_data = b""
            set_external_data(tensor, location, int(places["offset"]), int(places["length"]))
            tensor.ClearField("raw_data")
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())
    edit(bundle, lambda manifest: manifest["files"].update({"decoder.onnx": file_hash(bundle / "decoder.onnx")}))
    with pytest.raises(BackendError, match=r"cannot load .*decoder\.onnx: .* escapes model directory"):
        Embedder.load(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda certificate: certificate["modalities"]["video"].update(min_cosine=0.99), "min cosine of video is 0.99"),
        (lambda certificate: certificate["reasoned"].update(min_cosine=float("nan")), "min cosine of reasoned is nan"),
        (lambda certificate: certificate["modalities"]["text"].update(gate_flips=1), "1 gate flips for text"),
        (lambda certificate: certificate.update(token_agreement=0.9), "token agreement is 0.9"),
    ],
)
def test_a_certificate_below_its_bound_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(bundle, lambda manifest: change(manifest["certificate"]))
    with pytest.raises(CertificateError, match=message):
        Bundle.open(bundle)


def test_a_bundle_without_a_certificate_is_refused(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(certificate=None))
    with pytest.raises(CertificateError, match="has no certificate"):
        Bundle.open(bundle)
