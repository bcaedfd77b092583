"""Export works for any Qwen3-VL config, shares weights, certifies what it writes, and leaves nothing half done."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mmemb_deploy import CertificateError, Embedder, OptionError
from mmemb_deploy.backends.onnxruntime import OnnxRuntime
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.evaluation.pairs import Judge, Pair, encode_queries
from mmemb_deploy.evaluation.parity import answer, batch_parity
from mmemb_export import write
from mmemb_export.certify import certify
from mmemb_export.probes import synthetic_probes
from mmemb_export.recipe import Recipe
from mmemb_export.write import export_bundle
from mmemb_training.checkpoint import load_checkpoint

ODD_TEXT: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "hidden_size": 40,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]},
}
ODD_VISION: dict[str, Any] = {
    "depth": 1,
    "num_heads": 4,
    "patch_size": 3,
    "out_hidden_size": 40,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
PAIRS = [
    Pair(
        query=f"word {index}",
        candidates=[f"word {index}", "no"],
        relevant=[index % 4 > 0, index % 4 == 0],
        group=str(index % 3),
    )
    for index in range(12)
]


@pytest.fixture(scope="module")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """Multi-query attention, tied embeddings, odd patches, and no DeepStack level."""
    return Path(make_checkpoint(tmp_path_factory.mktemp("odd") / "checkpoint", ODD_TEXT, ODD_VISION))


@pytest.fixture(scope="module")
def odd_bundle(tmp_path_factory: pytest.TempPathFactory, odd_checkpoint: Path) -> Path:
    """The bundle of `odd_checkpoint`, calibrated on PAIRS."""
    target = tmp_path_factory.mktemp("odd") / "bundle"
    export_bundle(odd_checkpoint, target, pairs=PAIRS, pairs_name="words", report=lambda _: None)
    return target


@pytest.mark.parametrize("fixture", ["tiny_bundle", "odd_bundle"])
def test_any_config_is_certified_in_every_modality(fixture: str, request: pytest.FixtureRequest) -> None:
    certificate = Bundle.open(request.getfixturevalue(fixture)).manifest.certificate
    assert certificate is not None
    assert certificate.bounds == Recipe().bounds(200)
    assert {"text", "image", "images", "video"} == set(certificate.modalities)
    for parity in certificate.parities.values():
        assert parity.inputs >= 50
        assert parity.min_cosine >= 0.9999
        assert parity.gate_flips == 0
    assert certificate.token_agreement >= 0.995


def test_a_certificate_tells_another_model_apart(tiny_embedder: Embedder, tiny_checkpoint: Path) -> None:
    other = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        other.model.lm_head.weight.neg_()
        other.model.model.language_model.layers[2].mlp.down_proj.weight.mul_(0.7)
    probes = synthetic_probes(8)
    certificate, _ = certify(
        probes, answer(tiny_embedder, probes), batch_parity(tiny_embedder, probes), other, Recipe().bounds(8)
    )
    assert max(parity.min_cosine for parity in certificate.parities.values()) < 0.9999
    assert sum(parity.gate_flips for parity in certificate.modalities.values()) == 8
    assert certificate.token_agreement < 0.5
    with pytest.raises(CertificateError):
        certificate.check()


def test_both_decoder_graphs_share_one_copy_of_the_weights(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    locations: dict[str, set[str]] = {}
    for name in ("direct", "decoder"):
        model = onnx.load(tiny_bundle / f"{name}.onnx", load_external_data=False)
        locations[name] = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
    assert locations["direct"] == locations["decoder"] == {"decoder.onnx.data"}
    model = load_checkpoint(tiny_checkpoint).model
    weights = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    padding = 4096 * len(weights)
    size = (tiny_bundle / "decoder.onnx.data").stat().st_size
    assert size <= sum(weight.numel() * 4 for weight in weights) + padding


def test_the_gate_is_the_model_s_own_choice(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    ids = checkpoint.rows.prompt.ids
    state_BD = np.random.default_rng(0).normal(size=(50, 48)).astype(np.float32)
    gate = OnnxRuntime().load(Bundle.open(tiny_bundle)).gate
    assert gate is not None
    score_B = gate.run({abi.STATE: state_BD})[abi.SCORE]
    with torch.no_grad():
        logits_BV = checkpoint.model.lm_head(torch.from_numpy(state_BD))
    expected_B = torch.sigmoid(logits_BV[:, ids["<think>"]] - logits_BV[:, ids["<|im_end|>"]]).numpy()
    np.testing.assert_allclose(score_B, expected_B, atol=1e-6)


def test_the_manifest_names_every_tensor_and_axis(tiny_bundle: Path) -> None:
    graphs = Bundle.open(tiny_bundle).manifest.graphs
    assert tuple(graphs) == abi.GRAPHS
    shapes = {name: {t.name: t.shape for t in (*facts.inputs, *facts.outputs)} for name, facts in graphs.items()}
    assert shapes[abi.GATE] == {abi.STATE: ("batch", 48), abi.SCORE: ("batch",)}
    assert shapes[abi.VISION][abi.PIXELS] == ("images", "frames", "patches", 4, 12)
    assert shapes[abi.VISION][abi.SEGMENT_INDEX] == ("patches", 4)
    assert shapes[abi.EMBEDDER][abi.DEEPSTACK] == (2, "visual_tokens", 48)
    assert shapes[abi.EMBEDDER] == shapes[abi.GENERATOR]
    assert shapes[abi.GENERATOR]["past.0.value"] == shapes[abi.GENERATOR]["present.2.key"] == ("batch", 3, "slots", 16)
    assert shapes[abi.GENERATOR][abi.NEXT_POSITION] == (3, "batch", 1)
    inputs = {tensor.name for tensor in graphs[abi.DIRECT].inputs}
    assert inputs == {tensor.name for tensor in graphs[abi.EMBEDDER].inputs if "past" not in tensor.name} - {abi.START}
    assert set(shapes[abi.DIRECT]) == inputs | {abi.EMBEDDING, abi.STATE}


def test_a_graph_tells_nothing_of_the_machine_that_exported_it(tiny_bundle: Path) -> None:
    root = str(Path(write.__file__).parents[2]).encode()
    for path in tiny_bundle.glob("*.onnx"):
        graph = path.read_bytes()
        assert root not in graph
        assert b"site-packages" not in graph
        assert b".py" not in graph


def test_what_follows_the_last_attention_runs_on_last_tokens_alone(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    for name in (abi.DIRECT, abi.EMBEDDER, abi.GENERATOR):
        tokens: dict[str, set[str]] = {}
        for node in ir.load(bundle.graph(name)).graph:
            states, weight = node.inputs[:2] if node.op_type == "MatMul" else (None, None)
            if states is not None and weight is not None and ".mlp." in str(weight.name):
                assert states.shape is not None
                layer = str(weight.name).split(".mlp.")[0].rpartition(".")[2]
                tokens.setdefault(layer, set()).add(str(states.shape[1]))
        assert tokens == {"0": {"tokens"}, "1": {"tokens"}, "2": {"1"}}, name


def test_a_model_without_deepstack_has_no_such_tensor(odd_bundle: Path) -> None:
    graphs = Bundle.open(odd_bundle).manifest.graphs
    names = {tensor.name for facts in graphs.values() for tensor in (*facts.inputs, *facts.outputs)}
    assert abi.DEEPSTACK not in names


def test_the_curve_s_rate_falls_with_the_threshold(odd_bundle: Path) -> None:
    gate = Bundle.open(odd_bundle).manifest.gate
    assert gate is not None
    rates = [point.reasoning_rate for point in gate.curve]
    assert gate.calibration == "words"
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert gate.threshold in [point.threshold for point in gate.curve]
    assert Embedder.load(odd_bundle).manifest.gate == gate


def test_the_curve_s_ends_are_the_quality_of_always_and_never(odd_bundle: Path) -> None:
    embedder = Embedder.load(odd_bundle)
    gate = embedder.manifest.gate
    assert gate is not None
    judge, points = Judge(embedder, PAIRS), gate.curve
    always, never = (encode_queries(embedder, PAIRS, reasoning=mode) for mode in ("always", "never"))
    assert (points[0].threshold, points[-1].reasoning_rate) == (0.0, 0.0)
    assert points[0].quality == judge.hits(always.embeddings_QD).mean()
    assert points[-1].quality == judge.hits(never.embeddings_QD).mean()
    assert points[0].quality != points[-1].quality
    assert points[0].rationale_tokens == np.mean([detail.rationale_tokens for detail in always.details])
    assert points[-1].rationale_tokens == 0


def test_a_failed_certificate_leaves_nothing_behind_and_an_older_bundle_whole(
    odd_checkpoint: Path, odd_bundle: Path, tmp_path: Path
) -> None:
    older = Path(shutil.copytree(odd_bundle, tmp_path / "bundle"))
    with pytest.raises(CertificateError, match=r"below 1\.1"):
        export_bundle(odd_checkpoint, older, recipe=Recipe(min_cosine=1.1), overwrite=True, report=lambda _: None)
    assert list(tmp_path.iterdir()) == [older]
    assert Bundle.open(older).manifest == Bundle.open(odd_bundle).manifest


def test_an_existing_bundle_is_not_overwritten_unasked(odd_checkpoint: Path, odd_bundle: Path) -> None:
    with pytest.raises(OptionError, match="pass --overwrite"):
        export_bundle(odd_checkpoint, odd_bundle)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not an MMEmb-R1 checkpoint"):
        export_bundle(tmp_path, tmp_path / "bundle")
