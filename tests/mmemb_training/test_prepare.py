"""A public model becomes a checkpoint that trains and exports, and is otherwise what it was."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mmemb_deploy import OptionError
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.joint import Lesson
from mmemb_training.prepare import prepare
from mmemb_training.recipes.settings import JointRecipe, Objective, Schedule
from mmemb_training.trainer import train_jointly


@pytest.fixture
def public(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny model as if it were public: its tokenizer has other tokens in place of our two markers."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "public"))
    (folder / "mmemb.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|disc_emb|>", "<|box_a|>").replace("<|gen_emb|>", "<|box_b|>"))
    return folder


def test_markers_are_added_and_the_old_rows_kept(public: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    prepare(str(public), tmp_path / "start", dims=(48, 24), max_rationale_tokens=9)
    started, before = load_checkpoint(tmp_path / "start"), load_checkpoint(tiny_checkpoint)
    old = before.model.lm_head.weight
    ids = started.rows.prompt.ids
    assert sorted((ids["<|disc_emb|>"], ids["<|gen_emb|>"])) == [len(old), len(old) + 1]
    assert ids["<think>"] == before.rows.prompt.ids["<think>"]
    for table in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        new, known = started.model.state_dict()[table], before.model.state_dict()[table]
        assert len(new) % 64 == 0
        torch.testing.assert_close(new[: len(known)], known)
        torch.testing.assert_close(new[ids["<|disc_emb|>"]], known.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert started.vision == before.vision
    assert started.facts.provenance == {"source": str(public), "added": ["<|disc_emb|>", "<|gen_emb|>"]}


def test_a_prepared_model_trains(public: Path, lessons: list[Lesson], tmp_path: Path) -> None:
    checkpoint = prepare(str(public), tmp_path / "start", dims=(48,), max_rationale_tokens=9, max_pixels=1024)
    assert checkpoint.vision.max_pixels == 1024
    recipe = JointRecipe(schedule=Schedule(steps=3, learning_rate=1e-3), objective=Objective(dims=(48,)), batch=8)
    losses = [row["loss"] for row in train_jointly(checkpoint, lambda _: lessons[:8], recipe, tmp_path / "run")]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_a_size_that_the_model_does_not_have_is_refused(public: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"dims is \[64\]: the largest exceeds the hidden size 48"):
        prepare(str(public), tmp_path / "start", dims=(64,), max_rationale_tokens=9)
