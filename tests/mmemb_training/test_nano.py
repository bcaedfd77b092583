"""The nano recipe is deterministic, resumes exactly, and leaves a standard transformers folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmemb_deploy import OptionError
from mmemb_deploy.prompts import END_THINK, GEN_EMB, STOP, THINK
from mmemb_deploy.rows import collate
from mmemb_training.batches import encode_batch
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.joint import LOOKALIKES_PER_MATCH, draw_step, step_loss
from mmemb_training.loop import METRICS, STATE, learning_rate, train_nano
from mmemb_training.losses import info_nce, reasoning_helps
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


def test_a_match_is_answered_by_its_drawing_alone_and_other_queries_by_any_right_value(finished: Path) -> None:
    step = draw_step(load_checkpoint(finished).rows, NanoRecipe(batch=24), 0)
    queries = len(step.queries)
    matches = (len(step.candidates) - queries) // LOOKALIKES_PER_MATCH
    assert 0 < matches < queries
    assert step.relevant_QC[range(queries), range(queries)].all()
    for match in range(matches):
        first = queries + LOOKALIKES_PER_MATCH * match
        assert not step.relevant_QC[match, first : first + LOOKALIKES_PER_MATCH].any()
    assert step.relevant_QC[matches:, queries:].any()


def test_a_step_s_loss_is_the_sum_of_its_parts_row_by_row(finished: Path) -> None:
    checkpoint = load_checkpoint(finished)
    model, ids = checkpoint.model, checkpoint.rows.prompt.ids
    recipe = NanoRecipe(batch=12, micro_batches=3, lambda_g=0.7, lambda_d=0.3)
    step = draw_step(checkpoint.rows, recipe, 0)

    def states(row: Any) -> torch.Tensor:
        return encode_batch(model, collate([row], 0), checkpoint.vision)[0]

    with torch.no_grad():
        loss, metrics = step_loss(model, checkpoint.rows, step, recipe)
        hidden = [states(row) for row in step.queries]
        candidates_CD = torch.stack([states(row)[-1] for row in step.candidates])
    direct_QD = torch.stack([state[at - 1] for state, at in zip(hidden, step.prompt_lengths, strict=True)])
    reasoned_QD = torch.stack([state[-1] for state in hidden])
    helps = reasoning_helps(direct_QD, reasoned_QD, candidates_CD, torch.arange(12), step.relevant_QC).tolist()
    words, decisions = [], []
    for row, state, at, helped in zip(step.queries, hidden, step.prompt_lengths, helps, strict=True):
        path = row.token_ids_S[at:].tolist()
        assert (path[0], *path[-2:]) == (ids[THINK], ids[END_THINK], ids[GEN_EMB])
        logits_SV = F.log_softmax(model.lm_head(state), dim=-1)
        words += [-logits_SV[at + place, token].item() for place, token in enumerate(path[1:-1])]
        decisions.append(-logits_SV[at - 1, ids[THINK if helped else STOP]].item())
    expected = {
        "direct": info_nce(direct_QD, candidates_CD, step.relevant_QC, recipe.temperature, recipe.dims).item(),
        "reasoned": info_nce(reasoned_QD, candidates_CD, step.relevant_QC, recipe.temperature, recipe.dims).item(),
        "rationale": sum(words) / len(words),
        "decision": sum(decisions) / len(decisions),
        "helps": sum(helps) / len(helps),
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    total = metrics["reasoned"] + 0.7 * (metrics["rationale"] + metrics["decision"]) + 0.3 * metrics["direct"]
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    recipe = NanoRecipe(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(recipe, step) for step in range(101)]
    assert rates[0] == 0.1
    assert max(rates) == rates[10] == 1.0
    assert abs(rates[100]) < 1e-12


def test_a_recipe_refuses_what_cannot_be() -> None:
    with pytest.raises(OptionError, match="batch is 0"):
        NanoRecipe(batch=0)
