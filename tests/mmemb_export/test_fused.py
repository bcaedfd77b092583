"""Fused and quantised graphs: they answer as the portable ones do, in one graph, and say what they gave up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmemb_deploy import CertificateError, Embedder, OptionError
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_export import recipe as recipes
from mmemb_export import write
from mmemb_export.activations import sensitivity
from mmemb_export.probes import synthetic_probes
from mmemb_export.quantise import int4, int8
from mmemb_export.recipe import Recipe
from mmemb_export.write import export_bundle
from mmemb_training.checkpoint import load_checkpoint

RECIPES = {
    "float32": Recipe(form="fused"),
    # a random model's choices turn on the last digit
    "int8": Recipe(form="fused", precision="int8", min_cosine=0.9, max_flips=1, min_token_agreement=0),
    "int8-int4": Recipe(
        form="fused", precision="int8", generator_precision="int4", min_cosine=0.5, max_flips=1, min_token_agreement=0
    ),
}


@pytest.fixture(scope="module", params=RECIPES)
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint's bundle in fused form, in every precision."""
    target = tmp_path_factory.mktemp(request.param) / "bundle"
    export_bundle(tiny_checkpoint, target, recipe=RECIPES[request.param], probes=8, report=lambda _: None)
    return target


@pytest.mark.parametrize("reasoning", ["never", "always"])
def test_a_row_alone_equals_the_row_in_any_batch(fused: Path, mixed_inputs: list[Any], reasoning: str) -> None:
    embedder = Embedder.load(fused)
    alone = np.concatenate([embedder.encode([item], reasoning=reasoning) for item in mixed_inputs])
    for batch_size in (2, 32):
        together = embedder.encode(mixed_inputs, reasoning=reasoning, batch_size=batch_size)
        assert (alone * together).sum(axis=1).min() >= 0.99999


def test_given_rationales_give_what_the_same_generated_ones_gave(fused: Path, mixed_inputs: list[Any]) -> None:
    embedder = Embedder.load(fused)
    encoder = embedder.encoder
    written = embedder.encode_detailed(mixed_inputs, reasoning="always")
    details = [detail for detail in written.details if detail is not None]
    same = [encoder.prompt.tokenize(detail.rationale or "") == list(detail.rationale_ids) for detail in details]
    assert any(same)
    followed = embedder.encode(mixed_inputs, rationales=[detail.rationale for detail in details])
    assert (followed * written.embeddings).sum(axis=1)[same].min() >= 0.99999


def test_the_memory_of_a_cache_is_used_again_and_holds_nothing_of_before(fused: Path, mixed_inputs: list[Any]) -> None:
    embedder, fresh = (Embedder.load(fused, threads=1) for _ in range(2))
    embedder.encode(mixed_inputs, reasoning="always")
    for inputs in (mixed_inputs[:1], mixed_inputs[1:]):
        np.testing.assert_array_equal(
            embedder.encode(inputs, reasoning="always"), fresh.encode(inputs, reasoning="always")
        )


def test_one_precision_is_one_decoder_graph_and_two_are_two(fused: Path) -> None:
    graphs = Bundle.open(fused).manifest.graphs
    same = graphs[abi.EMBEDDER].precision == graphs[abi.GENERATOR].precision
    assert (graphs[abi.EMBEDDER].file == graphs[abi.GENERATOR].file) == same


def test_a_batch_for_a_cpu_is_smaller_than_one_for_an_engine(fused: Path, tiny_bundle: Path) -> None:
    ours, engines = (Bundle.open(folder).manifest.batch for folder in (fused, tiny_bundle))
    assert ours.tokens < engines.tokens


def test_an_instruction_that_was_seen_before_changes_nothing(fused: Path) -> None:
    embedder = Embedder.load(fused)
    first = embedder.encode(["one"], instruction="Find it.")
    embedder.encode(["two"], instruction="Find another.")
    np.testing.assert_array_equal(embedder.encode(["one"], instruction="Find it."), first)


def test_a_bundle_below_its_bound_keeps_its_most_sensitive_layers_before_it_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(*_: Any) -> dict[str, float]:
        return {"language_model.layers.0.mlp.down_proj.weight": 0.9, "language_model.layers.1.mlp.up_proj.weight": 0.1}

    monkeypatch.setattr(write, "sensitivity", two)
    kept: list[tuple[str, ...]] = []

    def watched(*arguments: Any) -> Any:
        facts = recipes.write_graphs(*arguments)
        kept.append(facts[abi.GENERATOR].kept)
        return facts

    monkeypatch.setattr(write, "write_graphs", watched)
    recipe = Recipe(form="fused", precision="int8", min_cosine=1.1)
    with pytest.raises(CertificateError, match=r"below 1\.1"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", recipe=recipe, probes=4, report=lambda _: None)
    assert kept == [(), ("language_model.layers.0.mlp.down_proj.weight",)]
    assert list(tmp_path.iterdir()) == []


def test_int8_is_off_by_half_a_step_at_most() -> None:
    weight_KN = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    values_KN, scale_N = int8(weight_KN)
    assert np.abs(values_KN * scale_N - weight_KN).max() <= scale_N.max() / 2 + 1e-6
    assert np.abs(values_KN).max(axis=0).tolist() == [127] * 10


def test_int4_is_off_by_half_a_step_at_most_but_for_the_far_end() -> None:
    weight_KN = np.random.default_rng(0).normal(size=(70, 10)).astype(np.float32)
    packed_NGS, scale_NG = int4(weight_KN)
    values_NGS = np.stack([packed_NGS & 15, packed_NGS >> 4], axis=-1).reshape(10, 3, 32).astype(np.float32) - 8
    coarse_KN = (values_NGS * scale_NG.reshape(10, 3, 1)).reshape(10, -1)[:, :70].T
    steps_KN = np.repeat(np.abs(scale_NG).reshape(10, 3), 32, axis=1)[:, :70].T
    assert (np.abs(coarse_KN - weight_KN) <= steps_KN * 1.01).all()
    assert np.mean(np.abs(coarse_KN - weight_KN) <= steps_KN * 0.501) > 0.97


def test_sensitivity_ranks_every_linear_layer_and_fewer_bits_lose_more_in_each(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    layers = [name for name, module in checkpoint.model.named_modules() if isinstance(module, torch.nn.Linear)]
    int8_errors, int4_errors = (sensitivity(checkpoint, synthetic_probes(4), bits) for bits in ("int8", "int4"))
    assert {f"{name.removeprefix('model.')}.weight" for name in layers} == set(int8_errors)
    assert list(int8_errors.values()) == sorted(int8_errors.values(), reverse=True)
    assert all(0 < int8_errors[name] < error for name, error in int4_errors.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "fuse"}, "did you mean 'fused'"),
        ({"form": "fused", "precision": "bfloat16"}, "needs form='portable'"),
        ({"precision": "bfloat16", "generator_precision": "float16"}, "share one KV cache"),
        ({"precision": "int9"}, "did you mean 'int8'"),
        ({"compute": "int8"}, "choose from float32"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**options)
