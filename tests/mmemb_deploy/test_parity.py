"""Certificates are measured against what a bundle keeps of its reference, and held to their bounds."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mmemb_deploy import BundleError, CertificateError, Embedder, OptionError, SchemaError
from mmemb_deploy.bundle.certificate import Bounds
from mmemb_deploy.bundle.folder import Bundle, file_hash
from mmemb_deploy.bundle.manifest import MANIFEST, read_manifest, write_manifest
from mmemb_deploy.cli.main import application
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_deploy.evaluation.parity import (
    REFERENCE,
    Answers,
    ReferenceSet,
    agreement_until_parting,
    bounds_of,
    measure,
    modality,
    neighbour_overlap,
    reference_of,
)
from mmemb_deploy.machine import cpu_features


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy that a test may change."""
    return Bundle.open(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))


def rewritten(bundle: Bundle, **certificate: Any) -> Bundle:
    """Write a bundle with another certificate."""
    known = bundle.manifest.certificate
    assert known is not None
    changed = bundle.manifest.model_copy(update={"certificate": known.model_copy(update=certificate)})
    write_manifest(bundle.folder, changed)
    return Bundle(bundle.folder, changed)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(application(), list(map(str, arguments)))


def test_a_bundle_meets_its_own_certificate_when_it_is_measured_again(bundle: Bundle) -> None:
    found = measure(Embedder.of_bundle(bundle), reference_of(bundle), bounds_of(bundle))
    found.check()
    known = bundle.manifest.certificate
    assert known is not None
    assert found.reference == known.reference
    assert set(found.modalities) == set(known.modalities)
    assert (found.cpu, found.token_agreement) == (cpu_features(), 1.0)
    assert all(parity.min_cosine > 0.99999 for parity in found.parities.values())


def test_what_a_bundle_keeps_are_the_inputs_and_the_answers_of_its_reference(
    bundle: Bundle, tmp_path: Path, mixed_inputs: list[Any]
) -> None:
    probes = [Pair(query=item, candidates=[], relevant=[], instruction=f"Find {item!r:.9}.") for item in mixed_inputs]
    written = ReferenceSet.measured(Embedder.of_bundle(bundle), probes)
    written.write(tmp_path)
    files = bundle.manifest.files | {REFERENCE: file_hash(tmp_path / REFERENCE)}
    read = ReferenceSet.of(Bundle(tmp_path, bundle.manifest.model_copy(update={"files": files})))
    assert [probe.instruction for probe in read.probes] == [probe.instruction for probe in probes]
    assert [modality(probe.query) for probe in read.probes] == [modality(probe.query) for probe in probes]
    assert read.answers.engine == written.answers.engine
    assert list(read.answers.rationales) == list(written.answers.rationales)
    again = ReferenceSet.measured(Embedder.of_bundle(bundle), read.probes).answers
    for one in (read.answers, again):
        np.testing.assert_array_equal(one.direct_ND, written.answers.direct_ND)
        np.testing.assert_array_equal(one.scores_N, written.answers.scores_N)
        np.testing.assert_array_equal(one.reasoned_ND, written.answers.reasoned_ND)


def test_a_sample_is_drawn_from_all_within_its_bytes() -> None:
    image = np.zeros((400, 400, 3), np.uint8)  # 480,000 bytes
    queries = [{"image": image} if index % 2 else "a text" for index in range(100)]
    probes = [Pair(query=query, candidates=[], relevant=[]) for query in queries]
    rows = np.arange(100, dtype=np.float32)
    answers = Answers("any", rows[:, None], rows, [(index,) for index in range(100)], None)
    sample = ReferenceSet(probes, answers).sample()
    kept = [int(row) for row in sample.answers.scores_N]
    assert kept == sorted(set(kept))
    assert [rationale for (rationale,) in sample.answers.rationales] == kept
    assert sum("image" in probe.query for probe in sample.probes) == 4  # 2 MiB of pixels
    assert len(sample.probes) == 32
    assert kept[0] < 10
    assert kept[-1] > 90


def test_another_model_than_the_reference_s_is_caught(bundle: Bundle) -> None:
    weights = bundle.folder / "decoder.onnx.data"
    values = np.fromfile(weights, np.float32)
    (values * np.random.default_rng(0).normal(1, 0.3, values.shape).astype(np.float32)).tofile(weights)
    found = measure(Embedder.of_bundle(bundle), reference_of(bundle), bounds_of(bundle))
    with pytest.raises(
        CertificateError, match=r"min cosine of .* is .*, measured on onnxruntime .* against transformers"
    ):
        found.check()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_cosine": 1.1}, r"min cosine of .* is .*, below 1\.1, measured on onnxruntime"),
        ({"gate_flips": -1}, "0 gate flips for .*, above -1"),
        ({"token_agreement": 1.1}, r"token agreement is 1\.0, below 1\.1"),
        ({"batch_cosine": 1.1}, r"an input alone and in a batch is .*, below 1\.1"),
    ],
)
def test_every_bound_that_is_missed_is_named(bundle: Bundle, bounds: dict[str, float], message: str) -> None:
    known = bundle.manifest.certificate
    assert known is not None
    with pytest.raises(CertificateError, match=message):
        known.model_copy(update={"bounds": known.bounds.model_copy(update=bounds)}).check()


def test_of_neighbours_that_are_equally_near_any_counts() -> None:
    theirs = np.array([[1, 0], [1, 0], [1, 0], [0.6, 0.8], [0, 1]], np.float32)
    rounded = theirs.copy()
    rounded[1, 0] -= 1e-7  # its copies are nearer to each other now
    assert neighbour_overlap(rounded, theirs) == 1
    rounded[3] = [0.8, 0.6]  # nearer to the copies than to the last row
    assert neighbour_overlap(rounded, theirs) == 0.8


def test_the_share_of_flips_that_is_allowed_holds_for_fewer_inputs(bundle: Bundle) -> None:
    bounds = Bounds.of(["bfloat16"], 200)
    assert bounds.gate_flips == 4
    assert bounds_of(rewritten(bundle, bounds=bounds))(32).gate_flips == 0
    assert bounds_of(rewritten(bundle, bounds=bounds))(100).gate_flips == 2


@pytest.mark.parametrize(
    ("ours", "theirs", "agreement"),
    [
        ([(1, 2)], [(1, 2)], 1.0),
        ([(1, 2)], [(1, 3)], 1 / 2),  # one agreed, one parted; what follows was chosen after other tokens
        ([(1,)], [(1, 2)], 1 / 2),
        ([()], [()], 1.0),
        ([], [], 0.0),
    ],
)
def test_choices_are_compared_as_long_as_they_follow_the_same_tokens(
    ours: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]], agreement: float
) -> None:
    assert agreement_until_parting(ours, theirs) == agreement


def test_a_bundle_that_keeps_nothing_can_be_measured_against_one_in_float32(bundle: Bundle) -> None:
    files = {name: digest for name, digest in bundle.manifest.files.items() if name != REFERENCE}
    bare = Bundle(bundle.folder, bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match=r"keeps no reference\.npz: .*--reference"):
        reference_of(bare)
    against = reference_of(bare, bundle)
    assert {modality(probe.query) for probe in against.probes} == {"text", "image", "images", "video"}
    measure(Embedder.of_bundle(bare), against, bounds_of(bare)).check()


def test_a_reference_in_another_precision_or_of_another_model_is_refused(bundle: Bundle) -> None:
    graphs = {
        name: graph.model_copy(update={"precision": "bfloat16"}) for name, graph in bundle.manifest.graphs.items()
    }
    half = Bundle(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs}))
    with pytest.raises(OptionError, match=r"is in bfloat16: pass a --reference"):
        reference_of(bundle, half)
    model = bundle.manifest.model.model_copy(update={"layers": 5, "name": "another"})
    other = Bundle(bundle.folder, bundle.manifest.model_copy(update={"model": model}))
    with pytest.raises(OptionError, match="is of another model than"):
        reference_of(bundle, other)


def test_verify_measures_prints_and_fails_where_a_bound_is_missed(bundle: Bundle) -> None:
    measured = run("verify", bundle.folder, "--measure", "--json")
    assert measured.exit_code == 0, measured.output
    certificate = json.loads(measured.stdout.splitlines()[-1])["certificate"]
    assert certificate["cpu"] == list(cpu_features())
    against = run("verify", bundle.folder, "--measure", "--reference", bundle.folder)
    assert against.exit_code == 0, against.output
    assert "alone, in a batch" in against.stdout
    known = bundle.manifest.certificate
    assert known is not None
    rewritten(bundle, batch=None, bounds=known.bounds.model_copy(update={"batch_cosine": 1.1}))
    failed = run("verify", bundle.folder, "--measure")
    assert isinstance(failed.exception, CertificateError)
    assert isinstance(run("verify", bundle.folder, "--reference", bundle.folder).exception, OptionError)


# ---------------------------------------------------------------- what a load says


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[Bundle], list[tuple[str, str]]]:
    """Load a bundle; return what was said of it, without what runs it."""

    def load(bundle: Bundle) -> list[tuple[str, str]]:
        with caplog.at_level(logging.INFO, "mmemb_deploy"):
            embedder = Embedder.of_bundle(bundle)
        said = [(record.levelname, record.getMessage()) for record in caplog.records]
        assert embedder.notes == tuple(text for _, text in said)
        return said[1:]

    return load


def test_a_certificate_of_this_cpu_with_its_due_bounds_needs_no_word(bundle: Bundle, notes: Any) -> None:
    assert notes(bundle) == []


def test_a_certificate_of_another_cpu_is_named_and_warned_of_where_kernels_differ(bundle: Bundle, notes: Any) -> None:
    other = rewritten(bundle, cpu=("x86_64", "avx2", "avx512f", "avx512_vnni"))
    here = " ".join(cpu_features())
    ((level, text),) = notes(other)
    assert level == "INFO"
    assert f"measured on x86_64 avx2 avx512f avx512_vnni, this is {here}: `mmemb verify --measure`" in text


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_certificate_of_coarse_weights_from_another_cpu_is_a_warning(bundle: Bundle, precision: str) -> None:
    other = rewritten(bundle, cpu=("aarch64", "asimd"))
    graphs = {name: graph.model_copy(update={"precision": precision}) for name, graph in other.manifest.graphs.items()}
    coarse = Bundle(other.folder, other.manifest.model_copy(update={"graphs": graphs}))
    assert [level for level, text in coarse.notes() if "this is" in text] == [logging.WARNING]


def test_a_certificate_that_names_no_cpu_is_warned_of(bundle: Bundle, notes: Any) -> None:
    ((level, text),) = notes(rewritten(bundle, cpu=()))
    assert (level, "does not say on which CPU" in text) == ("WARNING", True)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"min_cosine": 0.5}, "min_cosine 0.5 in place of 0.9999"),
        ({"gate_flips": 3}, "gate_flips 3 in place of 0"),
        ({"token_agreement": 0.1}, "token_agreement 0.1 in place of 0.995"),
        ({"batch_cosine": 0.0}, "batch_cosine 0.0 in place of 0.99999"),
    ],
)
def test_bounds_that_were_lowered_are_named_at_load(
    bundle: Bundle, notes: Any, bounds: dict[str, float], said: str
) -> None:
    known = bundle.manifest.certificate
    assert known is not None
    ((level, text),) = notes(rewritten(bundle, bounds=known.bounds.model_copy(update=bounds)))
    assert (level, text.endswith(said)) == ("WARNING", True)


def test_bounds_that_were_raised_are_nobody_s_business(bundle: Bundle, notes: Any) -> None:
    known = bundle.manifest.certificate
    assert known is not None
    assert notes(rewritten(bundle, bounds=known.bounds.model_copy(update={"min_cosine": 0.99995}))) == []


# ---------------------------------------------------------------- the digest


def test_the_digest_that_inspect_prints_holds_a_bundle_to_its_manifest(bundle: Bundle) -> None:
    shown = run("inspect", bundle.folder)
    digest = json.loads(run("inspect", bundle.folder, "--json").stdout)["digest"]
    assert f"digest {digest}" in shown.stdout
    Embedder.load(bundle.folder, digest=digest)
    assert run("verify", bundle.folder, "--digest", digest).exit_code == 0
    manifest = json.loads((bundle.folder / MANIFEST).read_text())
    manifest["vision"]["image_mean"] = [0.4, 0.5, 0.5]
    (bundle.folder / MANIFEST).write_text(json.dumps(manifest))
    Embedder.load(bundle.folder)  # a manifest is taken at its word unless one holds it to a digest
    with pytest.raises(BundleError, match=rf"manifest\.json has the digest [0-9a-f]{{64}}, not {digest}"):
        Embedder.load(bundle.folder, digest=digest)
    for command in (["verify", bundle.folder], ["calibrate", bundle.folder, "--data", "digitchain"]):
        assert isinstance(run(*command, "--digest", digest).exception, BundleError)
    source = bundle.folder.parent / "inputs.jsonl"
    source.write_text('"one"\n')
    refused = run("embed", source, source.with_name("out.npz"), bundle.folder, "--digest", digest)
    assert isinstance(refused.exception, BundleError)


def test_markers_that_are_not_the_tokenizer_s_are_refused(bundle: Bundle) -> None:
    markers = bundle.manifest.markers | {"<think>": 7}
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"markers": markers}))
    with pytest.raises(BundleError, match=r"markers\.<think> is 7, and the tokenizer's is \d+"):
        Embedder.load(bundle.folder)


def test_a_manifest_of_the_schema_before_says_to_export_again(bundle: Bundle) -> None:
    manifest = json.loads((bundle.folder / MANIFEST).read_text())
    manifest["schema_version"] = 2
    (bundle.folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SchemaError, match=r"has schema 2, this version reads 3: export the checkpoint again"):
        read_manifest(bundle.folder)
