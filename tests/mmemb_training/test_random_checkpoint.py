"""A random checkpoint has the shape it was asked for, and is read like any other."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mmemb_deploy import OptionError
from mmemb_training import checkpoint as module
from mmemb_training.checkpoint import load_checkpoint, outline_checkpoint
from mmemb_training.random_checkpoint import random_checkpoint
from mmemb_training.recipes.shapes import SHAPES, ModelShape, read_shape
from mmemb_training.weights import write_weights


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    """The shape that benchmarks call small, smaller still."""
    small = SHAPES["small"]
    text = replace(small.text, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=48, vocabulary=400)
    vision = replace(small.vision, hidden=32, layers=2, heads=2, intermediate=48, out=32, positions=16, deepstack=(0,))
    return replace(small, text=text, vision=vision)


def test_its_weights_are_those_of_the_shape_in_as_many_files_as_they_need(
    tmp_path: Path, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "write_weights", partial(write_weights, file_bytes=20_000))
    random_checkpoint(shape, tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("model-*.safetensors"))) > 2
    model = load_checkpoint(tmp_path / "checkpoint", dtype="bfloat16").model
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters()
    assert read_shape(tmp_path / "checkpoint").text == shape.text
    assert json.loads((tmp_path / "checkpoint" / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert 0.015 < model.lm_head.weight.float().std() < 0.025


def test_an_outline_has_shapes_and_no_values(tmp_path: Path, shape: ModelShape) -> None:
    random_checkpoint(shape, tmp_path / "checkpoint")
    model = outline_checkpoint(tmp_path / "checkpoint", dtype="bfloat16").model
    weight = model.lm_head.weight
    assert (tuple(weight.shape), weight.dtype) == ((400, 32), torch.bfloat16)
    with pytest.raises(RuntimeError):
        weight.numpy()


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path, shape: ModelShape) -> None:
    with pytest.raises(OptionError, match="choose another folder"):
        random_checkpoint(shape, tmp_path)
