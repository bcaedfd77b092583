"""The nano model goes through all stages, resumes between them, and every row of the ablation is measured."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmemb_deploy import OptionError
from mmemb_deploy.evaluation.digitchain import FAMILIES, DigitChain, apply_operator
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.nano.ablation import COSTS, RULES, SEEDS, Ablation
from mmemb_training.nano.ablation_report import draw, markdown
from mmemb_training.nano.digits import (
    MISREMEMBERED,
    Digits,
    draw_digits,
    exact,
    hollow,
    slips,
    states_only_truths,
    verbose,
)
from mmemb_training.nano.method import NanoRecipe, NanoRun, pair_aware
from mmemb_training.nano.model import MAX_RATIONALE_TOKENS, nano_checkpoint
from mmemb_training.selection.select import KeptRationales, kept_rationales

RECIPE = NanoRecipe(backbone_steps=2, pool=40, joint_steps=2, control_steps=2, batch=12, control_questions=2)
QUERIES = 5


class Watched:
    """Runs stages, and remembers which."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def __call__(self, name: str, metrics: Iterator[dict[str, float]], steps: int) -> None:
        rows = list(metrics)
        assert len(rows) == steps
        self.stages.append(name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Watched]:
    """A whole ablation of a recipe that learns nothing: its folder, tables and stages."""
    folder = tmp_path_factory.mktemp("nano")
    watched = Watched()
    source = DigitChain("calibration", 0)
    held_out = [Pair.of(example) for family in FAMILIES for example in source.examples(family, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmemb_training.nano.ablation.held_out_pairs", lambda _: held_out)
        patch.setattr("mmemb_training.nano.model.MAX_RATIONALE_TOKENS", 4)  # a model that learns nothing never stops
        tables = Ablation(folder, RECIPE, watched, report=lambda _: None, queries=QUERIES).tables()
    return folder, tables, watched


def test_the_ablation_runs_every_row_once(finished: tuple[Path, dict[str, Any], Watched]) -> None:
    folder, tables, watched = finished
    assert len(watched.stages) == len(set(watched.stages)) == 1 + len(RULES) + len(COSTS) + 1
    assert tuple(tables["selection"]) == tuple(RULES)
    assert set(tables["control"]["rows"]) == {
        "never",
        "always",
        "random_gate",
        "stage3_decision",
        "auto",
        "oracle_gate",
    }
    assert len(tables["reward"]) == 1 + len(COSTS) + 1
    assert all(len(values) == len(SEEDS) for row in tables["dependence"].values() for values in row.values())
    again = Watched()
    assert Ablation(folder, RECIPE, again, report=lambda _: None, queries=QUERIES).tables() == tables
    assert again.stages == []


def test_the_ablation_s_report_names_every_row(finished: tuple[Path, dict[str, Any], Watched], tmp_path: Path) -> None:
    _, tables, _ = finished
    text = markdown(tables)
    for name in (*RULES, "GRPO decision", "stage-3 decision", "oracle", "without paired groups", "shuffled", "emptied"):
        assert name in text
    draw(tables, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 10_000


def test_the_rates_of_the_control_table_are_equal(finished: tuple[Path, dict[str, Any], Watched]) -> None:
    rows = finished[1]["control"]["rows"]
    assert rows["auto"]["reasoning_rate"] == rows["random_gate"]["reasoning_rate"]
    assert rows["auto"]["reasoning_rate"] == rows["stage3_decision"]["reasoning_rate"]


def test_the_final_checkpoint_is_a_standard_transformers_folder(finished: tuple[Path, dict[str, Any], Watched]) -> None:
    watched = Watched()
    target = NanoRun(finished[0], RECIPE, watched).full()
    assert watched.stages == []  # the ablation made it already
    model = AutoModelForImageTextToText.from_pretrained(target)
    assert model.config.model_type == "qwen3_vl"
    facts = load_checkpoint(target).facts
    assert AutoTokenizer.from_pretrained(target).convert_tokens_to_ids("<|disc_emb|>") == facts.markers["<|disc_emb|>"]
    assert facts.provenance["data"] == "digitchain"
    assert facts.provenance["stages"] == ["backbone", "joint", "control"]


def test_another_recipe_does_not_continue_a_run(finished: tuple[Path, dict[str, Any], Watched], tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", finished[0] / "backbone", tmp_path / "backbone"], check=True)
    (tmp_path / "backbone" / "checkpoint" / "mmemb.json").unlink()
    other = replace(RECIPE, seed=1)
    for folder in (tmp_path, finished[0]):  # as it trains, and when it is done
        with pytest.raises(OptionError, match="holds the work of another job, with another recipe"):
            NanoRun(folder, other, Watched()).backbone()


def test_figures_of_another_ablation_are_not_taken_for_this_one_s(
    finished: tuple[Path, dict[str, Any], Watched],
) -> None:
    for recipe, queries, differing in ((RECIPE, QUERIES + 1, "queries"), (replace(RECIPE, seed=1), QUERIES, "recipe")):
        with pytest.raises(OptionError, match=f"the work of another job, with another {differing}: "):
            Ablation(finished[0], recipe, Watched(), report=lambda _: None, queries=queries)


def test_a_folder_that_is_no_checkpoint_names_what_is_missing(
    finished: tuple[Path, dict[str, Any], Watched], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"has no config\.json"):
        load_checkpoint(tmp_path)
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", finished[0] / "joint" / "checkpoint", broken], check=True)
    facts = json.loads((broken / "mmemb.json").read_text())
    (broken / "mmemb.json").write_text(json.dumps(facts | {"colour": "blue"}))
    with pytest.raises(OptionError, match=r"mmemb\.json is malformed"):
        load_checkpoint(broken)


def test_digits_are_a_function_of_their_seed(digits: Digits) -> None:
    again = draw_digits("train", 3, 48)
    assert [sample.question.key for sample in again.samples] == [sample.question.key for sample in digits.samples]
    assert again.told == digits.told
    assert len({sample.question.key for sample in again.samples}) == 48
    for sample in digits.samples:
        assert sample.wanted in sample.target.labels
        assert not any(sample.wanted in negative.labels for negative in sample.negatives)


def test_workers_are_flawed_as_their_names_say() -> None:
    told = draw_digits("train", 5, 600).told.values()
    chains = [(terms, operators) for terms, operators in told if operators]
    for terms, operators in chains:
        result = terms[0]
        for operator, right in zip(operators, terms[1:], strict=True):
            result = apply_operator(result, operator, right)
        assert exact(terms, operators).endswith(f"={result};")
        assert states_only_truths(exact(terms, operators))
        assert states_only_truths(verbose(terms, operators))
        assert not any(character.isdigit() for character in hollow(terms, operators))
        assert states_only_truths(hollow(terms, operators))  # it states nothing
        assert len(verbose(terms, operators)) > 1.5 * len(exact(terms, operators))
    pairs = [(terms, operators) for terms, operators in chains if len(operators) == 1]
    wrong = [not states_only_truths(slips(*pair)) for pair in pairs]
    assert abs(sum(wrong) / len(wrong) - MISREMEMBERED) < 0.15
    assert [slips(*pair) for pair in pairs] == [slips(*pair) for pair in pairs]


def test_every_rationale_fits_the_token_limit() -> None:
    tokenize = nano_checkpoint(0).rows.prompt.tokenize
    told = draw_digits("train", 6, 400).told.values()
    assert max(len(tokenize(rule(*one))) for one in told for rule in (exact, verbose, slips, hollow)) <= (
        MAX_RATIONALE_TOKENS
    )


def test_a_question_that_kept_nothing_is_taught_to_stop(finished: tuple[Path, dict[str, Any], Watched]) -> None:
    run = NanoRun(finished[0], RECIPE, Watched())
    kept = kept_rationales(run.selection(), pair_aware, temperature=1.0, unhelped="stop")
    assert KeptRationales() in kept.values()
    assert len(kept) == RECIPE.pool
