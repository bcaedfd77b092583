"""Peers run the same prompts, are held to the baseline's output first, and fail alone. No figure is asserted."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemb_benchmarks.commands.peers import peers as command
from mmemb_benchmarks.peers import BASELINE, PEERS, compare
from mmemb_benchmarks.peers.environments import PeerError, interpreter
from mmemb_benchmarks.peers.run import PeersResult, measure, prompts
from mmemb_benchmarks.peers.worker import Ids, Worker
from mmemb_deploy import OptionError
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.embedder import row_encoder


def run(checkpoint: Path, bundle: Path, *names: str) -> PeersResult:
    return compare(
        checkpoint,
        [bundle],
        names=names,
        environments=None,
        device="cpu",
        tokens=40,
        batches=[2],
        written=5,
        rounds=1,
        threads=1,
        report=lambda _: None,
    )


def test_peers_embed_the_same_prompts_alike_and_are_timed(tiny_checkpoint: Path, fused_bundle: Path) -> None:
    found = run(tiny_checkpoint, fused_bundle, "transformers eager", "transformers bfloat16")
    assert list(found.peers) == [BASELINE, "transformers eager", "transformers bfloat16", fused_bundle.name]
    assert not found.left_out
    for peer in found.peers.values():
        assert set(peer.seconds) == set(peer.spread) == {"embed x2", "token x2", "think and embed x2"}
        assert peer.environment
    exact = found.peers[fused_bundle.name].cosine, found.peers["transformers eager"].cosine
    assert exact == pytest.approx((1, 1), abs=1e-5)


def test_a_peer_whose_output_is_wrong_is_left_out_and_never_timed(
    tiny_checkpoint: Path, fused_bundle: Path, make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_checkpoint(tmp_path / "other", {"hidden_act": "relu"}, {})
    wrong = replace(PEERS["transformers eager"], options={"checkpoint": str(other)})
    monkeypatch.setitem(PEERS, "transformers eager", wrong)
    found = run(tiny_checkpoint, fused_bundle, "transformers eager")
    assert "its embedding is not the baseline's: cosine" in found.left_out["transformers eager"]
    assert set(found.peers) == {BASELINE, fused_bundle.name}


def test_a_peer_that_fails_says_why_and_the_others_go_on(tiny_checkpoint: Path, fused_bundle: Path) -> None:
    found = run(tiny_checkpoint, fused_bundle, "llama.cpp float32")
    assert found.left_out == {"llama.cpp float32": "ModuleNotFoundError: No module named 'llama_cpp'"}
    assert set(found.peers) == {BASELINE, fused_bundle.name}


class Stand:
    """A worker that answers so often, and is killed then."""

    def __init__(self, answers: int) -> None:
        self.calls, self._left = ["embed"], answers

    def run(self, _call: str, ids: Ids, _tokens: int = 0) -> tuple[Any, float]:
        self._left -= 1
        if self._left < 0:
            raise PeerError("killed")
        return ids, 1.0


def times(left_out: dict[str, str], **answers: int) -> dict[str, dict[str, list[float]]]:
    workers: dict[str, Any] = {name: Stand(count) for name, count in answers.items()}
    return measure(
        workers,
        lambda rows, _: [[1]] * rows,
        batches=[2],
        written=5,
        rounds=3,
        left_out=left_out,
        report=lambda _: None,
    )


def test_a_peer_that_dies_while_it_is_timed_loses_its_times_alone() -> None:
    left_out: dict[str, str] = {}
    assert times(left_out, transformers=4, other=2) == {"transformers": {"embed x2": [1.0] * 3}}
    assert left_out == {"other": "killed"}
    with pytest.raises(PeerError, match="killed"):
        times({}, transformers=2, other=4)


def test_a_process_that_was_killed_says_so(tiny_checkpoint: Path) -> None:
    worker = Worker(
        Path(sys.executable), "transformers", {"checkpoint": str(tiny_checkpoint), "threads": 1, "device": "cpu"}
    )
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(PeerError, match="want of memory"):
        worker.run("embed", [[1, 2]])


def test_without_the_baseline_there_is_nothing_to_compare(tmp_path: Path, fused_bundle: Path) -> None:
    with pytest.raises(PeerError):
        run(tmp_path / "no checkpoint", fused_bundle)


def test_prompts_are_different_and_of_one_length(fused_bundle: Path) -> None:
    ids = np.array(prompts(row_encoder(Bundle.open(fused_bundle)), 3, 50, seed=0))
    assert ids.shape == (3, 50)
    assert len({row.tobytes() for row in ids}) == 3


def test_an_environment_is_made_once_for_the_same_requirements(tmp_path: Path) -> None:
    made: list[Sequence[str]] = []

    def make(folder: Path, requirements: Sequence[str]) -> None:
        folder.mkdir()
        made.append(requirements)

    first = interpreter(["a==1"], tmp_path / "peers", make)
    assert interpreter(["a==1"], tmp_path / "peers", make) == first
    assert interpreter(["a==2"], tmp_path / "peers", make) != first
    assert made == [["a==1"], ["a==2"]]


def test_an_environment_that_was_not_finished_is_made_anew(tmp_path: Path) -> None:
    def fail(folder: Path, requirements: Sequence[str]) -> None:
        (folder / "half").mkdir(parents=True)
        raise PeerError(f"installing {requirements} failed")

    with pytest.raises(PeerError):
        interpreter(["a==1"], tmp_path, fail)
    python = interpreter(["a==1"], tmp_path, lambda folder, _: folder.mkdir())
    assert not (python.parents[1] / "half").exists()


def test_an_unknown_peer_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"llama\.cpp"):
        command(tmp_path, [tmp_path], peer=["lama.cpp"])


def test_a_peer_of_another_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"peer on cpu 'vLLM bfloat16' is not known: .*'vLLM for CPUs bfloat16'"):
        command(tmp_path, [tmp_path], peer=["vLLM bfloat16"])
