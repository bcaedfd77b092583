"""optimum's users find the export where they look: in `optimum-cli export`."""

from pathlib import Path

import pytest
from optimum.commands.optimum_cli import main

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle


def optimum_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["optimum-cli", "export", "mmemb", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_exports_a_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "bundle"
    assert optimum_cli(monkeypatch, str(tiny_checkpoint), str(target), "--form", "fused", "--probes", "4") == 0
    assert "certificate: min cosine" in capsys.readouterr().out
    assert Bundle.open(target).manifest.graphs[abi.EMBEDDER].file == "decoder.onnx"


def test_the_command_refuses_as_ours_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimum_cli(monkeypatch, str(tmp_path), str(tmp_path / "bundle")) == 2
    assert "is not an MMEmb-R1 checkpoint: it has no config.json" in capsys.readouterr().err
