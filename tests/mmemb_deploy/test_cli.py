"""The command line: exit codes, JSON for scripts, and the commands that other packages add."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmemb_deploy import __version__
from mmemb_deploy.cli.main import main


def mmemb(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "mmemb_deploy", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_help_lists_the_commands_of_every_package() -> None:
    shown = mmemb("--help").stdout
    for command in ("embed", "inspect", "verify", "calibrate", "demo", "bench", "train", "export", "eval"):
        assert f" {command} " in shown
    assert mmemb("--version").stdout.strip() == __version__


def test_embed_writes_the_file_and_a_json_summary(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "inputs.jsonl").write_text('"one"\n{"text": "two", "id": "second"}\n')
    run = mmemb("embed", "inputs.jsonl", "out.npz", "--bundle", tiny_bundle, "--document", "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])
    assert (summary["rows"], summary["failures"], summary["reasoning_rate"]) == (2, 0, 0.0)
    assert np.load(tmp_path / "out.npz")["id"].tolist() == ["1", "second"]


def test_a_user_s_mistake_exits_with_2_and_says_what_to_do(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "inputs.jsonl").write_text('"one"\n{"image": "absent.png"}\n')
    run = mmemb("embed", "inputs.jsonl", "out.npz", "--bundle", tiny_bundle, "--json", folder=tmp_path)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "input 1: 'image'" in run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["error"]["type"] == "InputError"
    for arguments in (["embed", "absent", "out.npz"], ["verify", tmp_path], ["inspect", tmp_path], ["nonsense"]):
        assert mmemb(*arguments, folder=tmp_path).returncode == 2


def test_an_error_is_shown_as_it_is_brackets_included(tmp_path: Path) -> None:
    assert "[remote] does not exist" in mmemb("embed", "absent[remote]", "out.npz", folder=tmp_path).stderr


def test_inspect_shows_graphs_gate_and_certificate(tiny_bundle: Path) -> None:
    shown = mmemb("inspect", tiny_bundle).stdout
    for words in ("visual_index", "default threshold 0.5", "certificate", "0.99", "layers 3"):
        assert words in shown
    assert json.loads(mmemb("inspect", tiny_bundle, "--json").stdout)["model"]["layers"] == 3


def test_verify_runs_the_bundle(tiny_bundle: Path) -> None:
    run = mmemb("verify", tiny_bundle, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["verified"] is True


@pytest.mark.parametrize(
    "command",
    [
        ["train", "nano"],
        ["train", "plan"],
        ["calibrate"],
        ["export"],
        ["bench", "digitchain"],
        ["demo"],
        ["eval", "mmeb-v2"],
    ],
)
def test_every_command_explains_itself(command: list[str]) -> None:
    run = mmemb(*command, "--help")
    assert run.returncode == 0
    assert "--json" in run.stdout


def test_train_and_export_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: each of its own would import torch and transformers."""

    def exit_code(*arguments: object) -> object:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        return ended.value.code

    monkeypatch.chdir(tmp_path)
    assert exit_code("train", "nano", "run", "--scale", "0.001", "--json") == 0
    checkpoint = json.loads(capsys.readouterr().out)["checkpoint"]
    assert exit_code("export", checkpoint, "bundle", "--form", "fused", "--probes", 24, "--json") == 0
    assert json.loads(capsys.readouterr().out)["certificate"]["token_agreement"] >= 0.995
    assert exit_code("verify", "bundle") == 0
    assert exit_code("export", checkpoint, "bundle") == 2
