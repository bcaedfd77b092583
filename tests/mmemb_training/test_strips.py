"""Strips: the instruction decides what helps, no worker knows it all, all arms are measured on the same questions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemb_deploy.evaluation.digitchain import apply_operator
from mmemb_training.pool.build import Rationale
from mmemb_training.selection.select import Assessed
from mmemb_training.strips import benchmark
from mmemb_training.strips.benchmark import DIAL, REINFORCED, run_benchmark
from mmemb_training.strips.judge import auc, noisy
from mmemb_training.strips.measure import Seen, best_threshold, by_decision, by_margin, threshold_of_tokens
from mmemb_training.strips.method import RULES, OwnRationales, Shared, StripsRecipe
from mmemb_training.strips.model import MAX_RATIONALE_TOKENS, strips_tokenizer
from mmemb_training.strips.questions import FAMILIES, SHARES, SIDE, Strip, answer_of, draw_pairs, draw_strips
from mmemb_training.strips.report import markdown, result
from mmemb_training.strips.workers import BELIEVED_WRONGLY, OFF_ASPECT, empty, states_only_truths, strip_workers, write

STRIP = Strip("middle", "result", (7, 4, 6, 0), ("x", "+", "-"))
RECIPE = StripsRecipe(
    backbone_steps=1, pool=20, control_pool=20, joint_steps=1, control_steps=2, batch=8, control_questions=2, rollouts=3
)


def test_one_strip_is_asked_for_four_things() -> None:
    assert write("result", STRIP) == "7x4=8;+6=4;-0=4;"
    assert write("evens", STRIP) == "even 4 6 0: 3;"
    assert write("first", STRIP) == "first 7;"
    assert write("same", STRIP) == "drawn 7 4 6 0;"
    assert [answer_of(aspect, STRIP.digits, STRIP.operators) for aspect in ("result", "evens", "first")] == [4, 3, 7]
    assert empty("7x4=8;") == "?x?=?;"


def test_a_truth_about_another_aspect_passes_instance_level_selection() -> None:
    assert states_only_truths(write("evens", STRIP), STRIP)
    assert not states_only_truths("7x4=9;+6=5;-0=5;", STRIP)


def test_questions_are_a_function_of_their_seed_and_look_new_in_every_rendering() -> None:
    first, again, other = (draw_strips("train", 3, 40, rendering) for rendering in (0, 0, 1))
    for one, same, new in zip(first.samples, again.samples, other.samples, strict=True):
        assert one.wanted == same.wanted == new.wanted
        assert np.array_equal(one.question.content["image"], same.question.content["image"])
        assert not np.array_equal(one.question.content["image"], new.question.content["image"])
        length = len(first.told[one.question.key].digits)
        assert one.question.content["image"].shape == (SIDE, SIDE * length)
        assert one.wanted in one.target.labels
        assert not any(one.wanted in negative.labels for negative in one.negatives)
    families = [strip.family for strip in first.told.values()]
    assert {family: families.count(family) for family in FAMILIES} == {name: 2 * SHARES[name] for name in FAMILIES}


def test_pairs_ask_what_samples_ask_and_have_one_right_candidate() -> None:
    pairs, samples = draw_pairs("test", 4, 20), draw_strips("test", 4, 20).samples
    for pair, sample in zip(pairs, samples, strict=True):
        assert (pair.instruction, pair.group) == (sample.question.instruction, sample.question.task)
        assert sum(pair.relevant) == 1
        assert len(pair.candidates) == 10


def test_no_two_workers_believe_the_same_step_wrongly() -> None:
    workers = strip_workers({}, 0)
    wrong = [
        {
            (left, operator, right)
            for operator in "+-x"
            for left in range(10)
            for right in range(10)
            if worker.step(left, operator, right) != apply_operator(left, operator, right)
        }
        for worker in workers
    ]
    assert [len(steps) / 300 for steps in wrong] == pytest.approx(list(BELIEVED_WRONGLY.values()), abs=0.005)
    assert len(set.union(*wrong)) == sum(map(len, wrong))


def test_workers_now_and_then_answer_something_else_truthfully() -> None:
    strips = draw_strips("train", 5, 400)
    (worker, *_) = strip_workers(strips.told, 0)
    questions = [sample.question for sample in strips.samples]
    told = [strips.told[question.key] for question in questions]
    texts = [written.rationales[0] for written in worker.write(questions)]
    off = [text for text, strip in zip(texts, told, strict=True) if text != write(strip.aspect, strip, worker.step)]
    assert len(off) / 400 == pytest.approx(OFF_ASPECT, abs=0.07)
    assert worker.write(questions) == worker.write(questions)


def test_every_rationale_fits_what_the_model_may_write() -> None:
    told = draw_strips("train", 6, 300).told.values()
    assert max(len(strips_tokenizer().encode(write("result", strip)).ids) for strip in told) < MAX_RATIONALE_TOKENS


def test_the_judge_errs_as_often_as_it_says_and_is_better_than_chance() -> None:
    rng = np.random.default_rng(0)
    true = [
        Assessed(str(index), "t", Rationale("w", 0, "first 3;"), float(gain), float(gain), found=False)
        for index, gain in enumerate(rng.normal(0, 20, 4000))
    ]
    judged = noisy(true, seed=1)
    flipped = np.mean([np.sign(one.gain) != np.sign(other.gain) for one, other in zip(judged, true, strict=True)])
    assert flipped == pytest.approx(0.15 + 0.02, abs=0.02)  # beside the flips, gains about zero that noise turns
    assert auc(true, true, 0.5) == 1.0
    assert 0.75 < auc(judged, true, 0.5) < 0.95
    assert noisy(true, seed=1) == judged != noisy(true, seed=2)


def seen() -> Seen:
    """Two renderings of four questions, of which the first two gain by reasoning and the last loses."""
    never = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], float)
    always = np.array([[1, 1, 1, 0], [1, 0, 1, 0]], float)
    scores = np.array([[0.9, 0.8, 0.2, 0.1]] * 2)
    return Seen(never, always, np.full((2, 4), 8.0), scores, scores, np.zeros((2, 4, 3)))


def test_thresholds_follow_from_held_out_questions() -> None:
    assert 0.2 < best_threshold(seen(), by_decision) <= 0.8  # reasoning for the first two, and no more
    at = threshold_of_tokens(seen(), by_decision, 4.0)
    assert seen().at(by_decision(seen()) >= at).tokens == 4.0
    assert by_margin(seen())[0].argmax() == 3  # the narrowest margin is the first to reason


def test_the_oracle_chooses_by_other_renderings_than_it_is_judged_by() -> None:
    assert seen().random(0.5) == pytest.approx(0.5 * 0.5 + 0.5 * 0.625)
    # The first question gains in both. The second gained in the first rendering alone: chosen for the other, it misses.
    assert seen().oracle(0.25) == pytest.approx(0.75)
    assert seen().oracle(0.5) <= 0.875


def test_own_rationales_are_kept_where_reasoning_helps_on_average() -> None:
    own = OwnRationales({"a": ["x", "y"], "b": ["z", "w"]}, {"a": [0.4, -0.1], "b": [0.1, -0.3]})
    assert own.kept("a").texts == ("x",)
    assert own.kept("b").texts == ()


def test_the_benchmark_measures_every_arm_once_and_reports_all(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmemb_training.strips.method.MAX_RATIONALE_TOKENS", 3)
    monkeypatch.setattr("mmemb_training.strips.model.MAX_RATIONALE_TOKENS", 3)
    monkeypatch.setattr(benchmark, "RENDERINGS", 2)
    monkeypatch.setattr(benchmark, "DIAL", DIAL[:1])
    stages: list[str] = []

    def watch(name: str, metrics: Iterator[dict[str, float]], steps: int) -> None:
        assert len(list(metrics)) == steps
        stages.append(name)

    tables = run_benchmark(Shared(tmp_path, RECIPE, watch), 1, 20, lambda _: None)
    assert len(stages) == len(set(stages)) == 1 + len(RULES) + 1 + 3
    found = json.loads(json.dumps(result([*tables, *tables])))
    text = markdown(found)
    for name in (*RULES, *FAMILIES, REINFORCED, "rejection sampling", "gate on the gap", "score structure"):
        assert name in text
    assert found["control"]["rejection sampling"]["behind"]["best"]["error"] == 0  # the same seed, twice
    again = run_benchmark(Shared(tmp_path, RECIPE, watch), 1, 20, lambda _: None)
    assert again == tables
    assert len(stages) == 9
