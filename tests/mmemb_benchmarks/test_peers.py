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
import typer
from typer.testing import CliRunner

from mmemb_benchmarks import commands
from mmemb_benchmarks.commands.peers import peers as command
from mmemb_benchmarks.measure import load as loads
from mmemb_benchmarks.measure.load import LoadResult
from mmemb_benchmarks.peers import contest as contests
from mmemb_benchmarks.peers.contenders import Ids
from mmemb_benchmarks.peers.contest import BASELINE, PEERS, PeersResult, contest, measure, prompts
from mmemb_benchmarks.peers.process import PeerError, PeerProcess, interpreter
from mmemb_benchmarks.workload import Maker
from mmemb_deploy import OptionError
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.preparer import row_encoder

WRONG, ABSENT = "transformers of another checkpoint", "llama.cpp float32"  # which no environment of the tests holds


def run(checkpoint: Path, bundle: Path, *names: str) -> PeersResult:
    return contest(
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


@pytest.fixture(scope="module")
def found(
    tiny_checkpoint: Path, fused_bundle: Path, make_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory
) -> PeersResult:
    """One run for all tests: every peer is a process that imports torch."""
    other = make_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint", {"hidden_act": "relu"}, {})
    wrong = replace(PEERS["transformers eager"], options={"checkpoint": str(other)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEERS, WRONG, wrong)
        return run(tiny_checkpoint, fused_bundle, "transformers eager", WRONG, ABSENT, "transformers bfloat16")


def test_peers_embed_the_same_prompts_alike_and_are_timed(found: PeersResult, fused_bundle: Path) -> None:
    assert list(found.peers) == [BASELINE, "transformers eager", "transformers bfloat16", fused_bundle.name]
    for peer in found.peers.values():
        assert set(peer.seconds) == set(peer.spread) == {"embed x2", "token x2", "think and embed x2"}
        assert peer.environment
    exact = found.peers[fused_bundle.name].cosine, found.peers["transformers eager"].cosine
    assert exact == pytest.approx((1, 1), abs=1e-5)


def test_a_peer_whose_output_is_wrong_is_left_out_and_never_timed(found: PeersResult) -> None:
    assert "its embedding is not the baseline's: cosine" in found.left_out[WRONG]
    assert WRONG not in found.peers


def test_a_peer_that_fails_says_why_and_the_others_go_on(found: PeersResult) -> None:
    assert found.left_out[ABSENT] == "ModuleNotFoundError: No module named 'llama_cpp'"
    assert found.left_out.keys() == {WRONG, ABSENT}


class Stand:
    """A process that answers so often, and is killed then."""

    def __init__(self, answers: int) -> None:
        self.calls, self._left = ["embed"], answers

    def run(self, _call: str, ids: Ids, _tokens: int = 0) -> tuple[Any, float]:
        self._left -= 1
        if self._left < 0:
            raise PeerError("killed")
        return ids, 1.0


def times(left_out: dict[str, str], **answers: int) -> dict[str, dict[str, list[float]]]:
    running: dict[str, Any] = {name: Stand(count) for name, count in answers.items()}
    return measure(
        running,
        lambda rows, _: [[1]] * rows,
        batches=[2],
        written=5,
        rounds=3,
        left_out=left_out,
        report=lambda _: None,
    )


def test_a_peer_that_dies_while_it_is_timed_loses_its_times_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contests, "SETTLE", 0)
    left_out: dict[str, str] = {}
    assert times(left_out, transformers=4, other=2) == {"transformers": {"embed x2": [1.0] * 3}}
    assert left_out == {"other": "killed"}
    with pytest.raises(PeerError, match="killed"):
        times({}, transformers=2, other=4)


def test_a_process_that_was_killed_says_so(fused_bundle: Path) -> None:
    load = {"checkpoint": "", "threads": 1, "device": "cpu", "folder": str(fused_bundle)}
    process = PeerProcess(Path(sys.executable), "bundle", load)
    os.kill(process.child.pid, signal.SIGKILL)
    with pytest.raises(PeerError, match="want of memory"):
        process.run("embed", [[1, 2]])


def test_without_the_baseline_there_is_nothing_to_compare(
    tmp_path: Path, fused_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEERS, BASELINE, PEERS[ABSENT])
    with pytest.raises(PeerError, match="llama_cpp"):
        run(tmp_path / "no checkpoint", fused_bundle)


def test_prompts_are_different_and_of_one_length(fused_bundle: Path) -> None:
    bundle = Bundle.open(fused_bundle)
    ids = np.array(prompts(Maker(row_encoder(bundle), bundle.manifest), 3, 50, seed=0))
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


def test_peers_serve_the_same_weights_beside_our_server_and_fail_alone(
    tiny_checkpoint: Path, fused_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "PRECISION", 1e6)
    app = typer.Typer()
    commands.register(app)
    shared = ["--queries", "6", "--threads", "1", "--trials", "1", "--p95-ms", "100000", "--seconds", "0.1"]
    words = ["bench", "load", str(fused_bundle), *shared, "--workload", "short text", "--mode", "never", "--json"]
    peers = ["--peer", "sentence-transformers", "--peer", "vLLM for CPUs bfloat16", "--here"]
    done = CliRunner().invoke(app, [*words, *peers, "--checkpoint", str(tiny_checkpoint)])
    assert done.exception is None, done.output
    result = LoadResult.model_validate_json(done.output.splitlines()[-1].partition('"result":')[2][:-1])
    assert list(result.targets) == ["mmemb serve", "sentence-transformers"]
    assert result.cosines == pytest.approx({"mmemb serve": 1, "sentence-transformers": 1}, abs=1e-5)
    assert "No module named 'vllm'" in result.left_out["vLLM for CPUs bfloat16"]
    assert all(load["never"].trials[0].held for load in result.targets.values())
