"""The nano recipe is deterministic, resumes exactly, and leaves a standard transformers folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmemb_deploy import OptionError
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.loop import METRICS, STATE, learning_rate, train_nano
from mmemb_training.nano import NanoRecipe

RECIPE = NanoRecipe(steps=4, batch=8, micro_batches=2, save_every=2, warmup=2)


def weights(folder: Path) -> dict[str, Any]:
    model: dict[str, Any] = torch.load(folder / STATE, weights_only=True)["model"]
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of RECIPE."""
    folder = tmp_path_factory.mktemp("nano") / "whole"
    assert [metrics["step"] for metrics in train_nano(folder, RECIPE)] == [1, 2, 3, 4]
    return folder


def test_an_interrupted_run_goes_on_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    run = train_nano(tmp_path, RECIPE)
    for _ in range(3):  # the third step comes after the last checkpoint, and is lost
        next(run)
    run.close()
    assert [metrics["step"] for metrics in train_nano(tmp_path, RECIPE)] == [3, 4]
    expected = weights(finished)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    steps = [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_folder_with_another_recipe_is_refused(finished: Path) -> None:
    with pytest.raises(OptionError, match="holds a run with another recipe"):
        next(train_nano(finished, NanoRecipe(seed=1, steps=4)))


def test_a_checkpoint_is_a_standard_transformers_folder(finished: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(finished)
    assert model.config.model_type == "qwen3_vl"
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert tokenizer.convert_tokens_to_ids("<|disc_emb|>") == load_checkpoint(finished).facts.markers["<|disc_emb|>"]
    provenance = load_checkpoint(finished).facts.provenance
    assert (provenance["data"], provenance["step"], provenance["recipe"]["batch"]) == ("digitchain", 4, 8)


def test_a_folder_that_is_no_checkpoint_names_what_is_missing(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"it has no config\.json"):
        load_checkpoint(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in finished.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "mmemb.json").write_text("{}")
    with pytest.raises(OptionError, match=r"mmemb\.json is malformed"):
        load_checkpoint(broken)


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    recipe = NanoRecipe(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(recipe, step) for step in range(101)]
    assert rates[0] == 0.1
    assert max(rates) == rates[10] == 1.0
    assert abs(rates[100]) < 1e-12


def test_a_recipe_refuses_what_cannot_be() -> None:
    with pytest.raises(OptionError, match="batch is 0"):
        NanoRecipe(batch=0)
