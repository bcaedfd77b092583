"""optimum's users find the export where they look: in `optimum-cli export`."""

import subprocess
import sys
from pathlib import Path

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "mmemb", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_exports_a_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    run = optimum_cli(str(tiny_checkpoint), str(target), "--form", "fused", "--probes", "4")
    assert run.returncode == 0, run.stderr
    assert "certificate: min cosine" in run.stdout
    assert Bundle.open(target).manifest.graphs[abi.EMBEDDER].file == "decoder.onnx"


def test_the_command_refuses_as_ours_does(tmp_path: Path) -> None:
    run = optimum_cli(str(tmp_path), str(tmp_path / "bundle"))
    assert run.returncode == 2
    assert "is not an MMEmb-R1 checkpoint: it has no config.json" in run.stderr
