"""The measurements of speed run, compare like with like, and leave nothing behind. No figure is asserted."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from mmemb_benchmarks.peers import BASELINE, PEERS, compare, prompts
from mmemb_benchmarks.runtime_costs import graph_seconds, measure_loading, measure_runtime, words
from mmemb_deploy import Embedder


def test_peers_embed_the_same_prompts_alike(tiny_checkpoint: Path, fused_bundle: Path) -> None:
    found = compare(
        tiny_checkpoint, [fused_bundle], others=[], tokens=40, batches=[1, 2], written=4, rounds=1, threads=1,
        report=lambda _: None,
    )  # fmt: skip
    assert found["tokens"] == 40
    assert found["cosine"] == pytest.approx({BASELINE: 1.0, fused_bundle.name: 1.0}, abs=1e-5)
    assert set(found["seconds"][BASELINE]) == set(found["seconds"][fused_bundle.name])
    assert set(found["ratio"]) == {fused_bundle.name}


def test_prompts_are_different_and_of_one_length(fused_bundle: Path) -> None:
    rows = prompts(Embedder.load(fused_bundle), 3, 50, seed=0)
    assert [row.length for row in rows] == [50] * 3
    assert len({row.token_ids_S.tobytes() for row in rows}) == 3


def test_other_types_of_weights_are_the_same_model(tiny_checkpoint: Path, fused_bundle: Path) -> None:
    rows = prompts(Embedder.load(fused_bundle), 2, 40, seed=0)
    exact, half = (PEERS[name](tiny_checkpoint, 1).prefill(rows) for name in (BASELINE, "transformers bfloat16"))
    assert np.sum(exact * half, axis=1).min() > 0.99


def test_time_in_graphs_is_part_of_the_whole_and_the_session_is_as_it_was(fused_bundle: Path) -> None:
    before = onnxruntime.InferenceSession.run
    found = measure_runtime(
        Embedder.load(fused_bundle, threads=1), words(30, 2), written=3, rounds=1, report=lambda _: None
    )
    assert onnxruntime.InferenceSession.run is before
    assert 0 < found["overhead never"] < 1
    assert 0 < found["overhead always"] < 1
    assert found["tokens of a prompt over those after its head"] > 1


def test_no_time_in_graphs_is_missed(fused_bundle: Path) -> None:
    embedder = Embedder.load(fused_bundle)
    with graph_seconds() as spent:
        embedder.encode(["a"], reasoning="never", instruction="a head that nobody has prefilled")
    assert len(spent) == 3  # the head, the rest, and the gate


def test_loading_is_measured_in_processes_of_their_own(fused_bundle: Path) -> None:
    found = measure_loading(fused_bundle, None, threads=1, runs=1)
    assert found["weights, bytes"] == sum(path.stat().st_size for path in fused_bundle.glob("*.onnx.data"))
    for path in ("never", "always"):
        assert found[f"bundle, {path}: peak bytes"] > 2**24
