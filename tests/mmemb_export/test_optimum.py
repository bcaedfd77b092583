"""optimum's users find the export where they look: in `optimum-cli export`, and in the TasksManager."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_export.optimum_tasks import BACKEND
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.parts import parts

TASKS = {abi.EMBEDDER: "feature-extraction", abi.GENERATOR: "text-generation-with-past"}


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "mmemb", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def constructor(graph: str) -> Any:
    return TasksManager.get_exporter_config_constructor(
        BACKEND, model_type="qwen3_vl", task=TASKS[graph], library_name="transformers"
    )


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


@pytest.mark.parametrize("graph", TASKS)
def test_tasks_name_the_axes_of_the_exported_graph(graph: str, tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    config = constructor(graph)(AutoConfig.from_pretrained(tiny_checkpoint))
    facts = Bundle.open(tiny_bundle).manifest.graphs[graph]
    for ours, written in ((config.inputs, facts.inputs), (config.outputs, facts.outputs)):
        varying = {
            tensor.name: {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
            for tensor in written
        }
        for axes in varying.values():
            axes.update({axis: "all_tokens" for axis, size in axes.items() if "+" in size})
        assert ours == varying


@pytest.mark.parametrize("graph", TASKS)
def test_dummy_inputs_run(graph: str, tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    config = constructor(graph)(checkpoint.model.config)
    inputs = config.generate_dummy_inputs()
    part = parts(checkpoint.model, checkpoint.rows.prompt.ids)[graph]
    values = [inputs[name] for name in part.inputs]
    split = len(values) - part.listed
    with torch.no_grad():
        outputs = part(*values[:split], *([values[split:]] if part.listed else []))
    assert len(outputs) == len(config.outputs)
    with pytest.raises(ValueError, match="fixed shapes, not 'tf'"):
        config.generate_dummy_inputs(framework="tf")
