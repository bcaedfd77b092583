"""Fused and quantised graphs: they answer as the portable ones do, in one graph, and say what they gave up."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from mmemb_deploy import CertificateError, Embedder, OptionError
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.precision import PRECISIONS
from mmemb_deploy.cli.main import application
from mmemb_export import traced, write
from mmemb_export.recipe import FORMS, Recipe
from mmemb_export.trace import trace
from mmemb_export.write import export_bundle

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


def batch_cosine(bundle: Path, reasoning: str) -> float:
    """Return what a row alone and in a batch have in common at least, by the precision of the last graph passed."""
    graphs = Bundle.open(bundle).manifest.graphs
    return PRECISIONS[graphs[abi.EMBEDDER if reasoning == "never" else abi.GENERATOR].precision].batch_cosine


@pytest.mark.parametrize("reasoning", ["never", "always"])
def test_a_row_alone_equals_the_row_in_any_batch(fused: Path, mixed_inputs: list[Any], reasoning: str) -> None:
    embedder = Embedder.load(fused)
    alone = np.concatenate([embedder.encode([item], reasoning=reasoning) for item in mixed_inputs])
    for batch_size in (2, 32):
        together = embedder.encode(mixed_inputs, reasoning=reasoning, batch_size=batch_size)
        assert (alone * together).sum(axis=1).min() >= batch_cosine(fused, reasoning)


def test_given_rationales_give_what_the_same_generated_ones_gave(fused: Path, mixed_inputs: list[Any]) -> None:
    embedder = Embedder.load(fused)
    encoder = embedder.encoder
    written = embedder.encode_detailed(mixed_inputs, reasoning="always")
    details = [detail for detail in written.details if detail is not None]
    same = [encoder.prompt.tokenize(detail.rationale or "") == list(detail.rationale_ids) for detail in details]
    assert any(same)
    followed = embedder.encode(mixed_inputs, rationales=[detail.rationale for detail in details])
    assert (followed * written.embeddings).sum(axis=1)[same].min() >= batch_cosine(fused, "always")


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


def test_no_head_is_normed_vector_by_vector(fused: Path) -> None:
    bundle = Bundle.open(fused)
    layers = bundle.manifest.model.layers
    for name in (abi.EMBEDDER, abi.GENERATOR):
        norms = Counter(node.op_type for node in ir.load(bundle.graph(name)).graph if "Norm" in node.op_type)
        assert norms == {"RMSNormalization": 2 * layers + 1, "SkipSimplifiedLayerNormalization": 2 * layers}


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
    graphs: list[str] = []
    write_once = traced.TracedGraphs.write

    def written(self: traced.TracedGraphs, folder: Path, choices: traced.Choices) -> Any:
        facts = write_once(self, folder, choices)
        kept.append(facts[abi.GENERATOR].kept)
        return facts

    def traced_graph(graph: Any, weights: Any) -> Any:
        graphs.append(graph.name)
        return trace(graph, weights)

    monkeypatch.setattr(traced.TracedGraphs, "write", written)
    monkeypatch.setattr(traced, "trace", traced_graph)
    recipe = Recipe(form="fused", precision="int8", min_cosine=1.1)
    with pytest.raises(CertificateError, match=r"below 1\.1"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", recipe=recipe, probes=4, report=lambda _: None)
    assert kept == [(), ("language_model.layers.0.mlp.down_proj.weight",)]
    assert graphs == ["vision", "decoder", "gate"]  # once, however often they are written
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_precisions_of_every_form() -> None:
    said = " ".join(CliRunner().invoke(application(), ["export", "--help"], env={"COLUMNS": "400"}).output.split())
    for form, precisions in FORMS.items():
        assert f"{form}: {', '.join(precisions)}" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "fuse"}, "did you mean 'fused'"),
        ({"form": "fused", "precision": "bfloat16"}, "needs form='portable'"),
        ({"form": "fused", "precision": "int8", "compute": "bfloat16"}, "needs form='portable'"),
        ({"precision": "bfloat16", "generator_precision": "float16"}, "share one KV cache"),
        ({"precision": "int9"}, "did you mean 'int8'"),
        ({"compute": "int8"}, "choose from float32"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Recipe(**options)
