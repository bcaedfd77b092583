"""Selection scores pairs by counterfactuals, keeps what helps by what it says, and never mines a right answer."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmemb_deploy import OptionError
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.rows import collate
from mmemb_training.checkpoint import Checkpoint, load_checkpoint
from mmemb_training.nano.digits import Digits
from mmemb_training.pool.build import Rationale
from mmemb_training.prefill import prefill
from mmemb_training.processes import Processes
from mmemb_training.recipes.settings import Margins
from mmemb_training.samples import Question, Sample, Target, query_row, target_row
from mmemb_training.selection import assess as module
from mmemb_training.selection import bank as bank_module
from mmemb_training.selection import mining
from mmemb_training.selection.assess import OtherRationales, assess, assess_pool
from mmemb_training.selection.bank import TargetBank, embed_rows
from mmemb_training.selection.evaluators import Confidence, EmbedderEvaluator, JudgeEvaluator
from mmemb_training.selection.mining import drawn_evenly, mine_negatives, nearest_of
from mmemb_training.selection.select import Assessed, Verdict, kept_rationales, report


@pytest.fixture(scope="module")
def model(tiny_checkpoint: FilePath) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def mined(digits: Digits, model: Checkpoint) -> Sequence[Sample]:
    bank = TargetBank(digits.samples, model)
    return mine_negatives(digits.samples, bank, model, hard=3, even=2, share_of_positive=None)


def state(model: Checkpoint, row: Any, tokens: Sequence[int] = ()) -> torch.Tensor:
    """The last state of one prompt and what follows it, by one forward pass of its own."""
    with torch.no_grad():
        return prefill(model.model, collate([row.extended(tokens)], 0), model.vision)[0][0, -1]


def test_the_embedder_s_confidence_is_its_softmax_at_the_target(mined: Sequence[Sample], model: Checkpoint) -> None:
    samples, rationales = mined[8:12], [["3+4=7;", "?"], [], ["a"], ["no", "7", "3+4=7;"]]
    evaluator = EmbedderEvaluator(model, TargetBank(mined, model), temperature=0.05)
    found = evaluator.confidences(samples, rationales)
    for sample, texts, confidence in zip(samples, rationales, found, strict=True):
        row = query_row(sample.question, model.rows)
        targets = [state(model, target_row(target, model.rows)) for target in (sample.target, *sample.negatives)]

        def l(tokens: Sequence[int], row: Any = row, targets: list[torch.Tensor] = targets) -> torch.Tensor:  # noqa: E743
            query_D = state(model, row, tokens)
            cosines = torch.stack([F.cosine_similarity(query_D, target_D, dim=0) for target_D in targets])
            return (cosines / 0.05).log_softmax(dim=0)

        expected = [l(model.rows.prompt.path(model.rows.prompt.tokenize(text))) for text in texts]
        assert confidence.without == pytest.approx(l([])[0].item(), abs=1e-3)
        assert confidence.with_each == pytest.approx([one[0].item() for one in expected], abs=1e-3)
        gains = [(one - l([]))[1:].mean().item() for one in expected]
        assert confidence.gain_on_negatives == pytest.approx(gains, abs=1e-3)


def test_the_judge_s_confidence_is_yes_against_no_after_the_rationale(model: Checkpoint) -> None:
    image = np.full((16, 16, 3), 90, np.uint8)
    sample = Sample(
        question=Question(key="a", task="t", content={"image": image, "text": "what is it?"}, instruction="Find it."),
        wanted="x",
        target=Target(content={"text": "seven", "image": image}, labels=frozenset("x")),
    )
    (found,) = JudgeEvaluator(model).confidences([sample], [["it is a seven", "no idea"]])
    tokenize = model.rows.prompt.tokenize
    text = "Query: Find it. what is it?\nCandidate: seven"
    instruction = "Decide whether the candidate is what the query asks for. The query's images come first."
    prompt = model.rows.row(parse({"images": [image, image], "text": text}), instruction)
    bare = replace(
        prompt,
        token_ids_S=prompt.token_ids_S[:-1],
        position_ids_3S=prompt.position_ids_3S[:, :-1],
        visual_index_S=prompt.visual_index_S[:-1],
    )
    yes, no = (tokenize(f" {word}")[-1] for word in ("yes", "no"))
    ask = tokenize("Does the candidate match? Answer:")
    odds = []
    for tokens in (ask, *([*tokenize(f"About the query: {one}\n"), *ask] for one in ("it is a seven", "no idea"))):
        logits_V = model.model.lm_head(state(model, bare, tokens))
        odds.append((logits_V[yes] - logits_V[no]).item())
    assert [found.without, *found.with_each] == pytest.approx(odds, abs=1e-3)


def test_the_judge_refuses_two_videos(model: Checkpoint) -> None:
    video = {"video": [np.zeros((16, 16, 3), np.uint8)] * 2}
    question = Question(key="clip", task="t", content=video)
    sample = Sample(question=question, wanted="x", target=Target(content=video, labels=frozenset("x")))
    with pytest.raises(OptionError, match="clip: the judge reads one video per pair"):
        JudgeEvaluator(model).confidences([sample], [["a"]])


class KnownConfidence:
    """An evaluator that is sure of rationales by what they say: "good", "bad", or nothing ("hollow")."""

    def confidences(self, samples: Sequence[Sample], rationales: Sequence[Sequence[str]]) -> list[Confidence]:
        value = {"good": 3.0, "bad": -4.0, "hollow": 1.0}
        found = []
        for sample, texts in zip(samples, rationales, strict=True):
            own = [
                value[text.split()[0]] if sample.question.key in text or "hollow" in text else -2.0 for text in texts
            ]
            found.append(Confidence(0.0, tuple(own), found=False, gain_on_negatives=(0.5,) * len(texts)))
        return found


def questions(count: int) -> list[Sample]:
    return [
        Sample(
            question=Question(key=f"q{index}", task="t", content="x"),
            wanted="a",
            target=Target(content="y", labels=frozenset("a")),
        )
        for index in range(count)
    ]


def test_content_tells_a_hollow_rationale_from_a_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = questions(6)
    pool = {
        sample.question.key: [
            Rationale("solver", 0, f"good {sample.question.key}"),
            Rationale("liar", 0, f"bad {sample.question.key}"),
            Rationale("poser", 0, "hollow"),
        ]
        for sample in samples
    }
    monkeypatch.setattr(module, "BATCH", 4)
    found = list(assess(samples, pool, KnownConfidence(), OtherRationales(samples, pool, 2, 0)))
    assert {(one.rationale.worker, one.verdict(Margins())) for one in found} == {
        ("solver", Verdict.KEPT),
        ("liar", Verdict.HARMFUL),
        ("poser", Verdict.FORMAT_ONLY),
    }
    assert {one.content for one in found if one.rationale.worker == "solver"} == {5.0}  # 3 against others' -2
    counts = report(found, Margins())
    assert counts["worker"]["poser"] == {"kept": 0, "format-only": 6, "useless": 0, "harmful": 0}
    assert counts["task"]["t"] == {"kept": 6, "format-only": 6, "useless": 0, "harmful": 6}
    assert counts["questions"]["t"] == {"kept": 6, "easy": 0, "unhelped": 0}
    against = next(
        iter(assess(samples, pool, KnownConfidence(), OtherRationales(samples, pool, 2, 0), against_negatives=True))
    )
    assert against.gain == 2.5


def test_an_interrupted_selection_goes_on_and_judges_nothing_twice(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    samples = questions(5)
    pool = {one.question.key: [Rationale("solver", 0, f"good {one.question.key}")] for one in samples[:4]}
    asked: list[str] = []

    class Counting(KnownConfidence):
        def confidences(self, samples: Sequence[Sample], rationales: Sequence[Sequence[str]]) -> list[Confidence]:
            if len(asked) == 2 and not (tmp_path / "resumed").exists():
                raise KeyboardInterrupt
            asked.extend(sample.question.key for sample in samples)
            return super().confidences(samples, rationales)

    with pytest.raises(KeyboardInterrupt):
        assess_pool(samples, pool, Counting(), tmp_path / "selection", Margins(), identity="known")
    (tmp_path / "resumed").touch()
    found = list(assess_pool(samples, pool, Counting(), tmp_path / "selection", Margins(), identity="known"))
    assert asked == ["q0", "q1", "q2", "q3"]  # q4 has no candidate
    assert [one.question for one in found] == asked
    assert json.loads((tmp_path / "selection" / "report.json").read_text())["worker"]["solver"]["kept"] == 4
    with pytest.raises(OptionError, match="holds the work of another job, with another evaluator"):
        assess_pool(samples, pool, Counting(), tmp_path / "selection", Margins(), identity="other")
    against = Margins(against_negatives=True)
    with pytest.raises(OptionError, match="another against_negatives"):
        assess_pool(samples, pool, Counting(), tmp_path / "selection", against, identity="known")


def assessed(question: str, gain: float, text: str, *, found: bool = False) -> Assessed:
    return Assessed(question, "t", Rationale("w", 0, text), gain, gain, found)


def test_a_question_that_needs_no_rationale_is_told_from_one_that_nobody_helped() -> None:
    found = [
        assessed("easy", 0.1, "one", found=True),
        assessed("easy", -3.0, "two", found=True),
        assessed("lost", -1.0, "three"),
        assessed("lost", 0.2, "four"),
        assessed("helped", -1.0, "five"),
        assessed("helped", 2.0, "six"),
        assessed("surer", 2.0, "seven", found=True),
    ]
    assert report(found, Margins())["questions"]["t"] == {"kept": 2, "easy": 1, "unhelped": 1}
    for unhelped in ("undecided", "stop"):
        kept = kept_rationales(
            found, lambda one: one.verdict(Margins()) is Verdict.KEPT, temperature=1.0, unhelped=unhelped
        )
        taught = {question: one.decides for question, one in kept.items()}
        assert taught == {"easy": True, "lost": unhelped == "stop", "helped": True, "surer": True}
        assert [question for question, one in kept.items() if one.texts] == ["helped", "surer"]


def test_an_evaluator_finds_a_pair_that_it_ranks_first_or_says_yes_to(mined: list[Sample], model: Checkpoint) -> None:
    pairs, bank = [replace(sample, negatives=sample.negatives[-1:]) for sample in mined], TargetBank(mined, model)
    ranked = EmbedderEvaluator(model, bank, temperature=0.05).confidences(pairs, [[] for _ in pairs])
    for sample, one in zip(pairs, ranked, strict=True):
        query_D = F.normalize(state(model, query_row(sample.question, model.rows)), dim=0).numpy()
        similarity_C = bank.candidates(sample) @ query_D
        assert one.found == (similarity_C.argmax() == 0)
    assert len({one.found for one in ranked}) == 2
    plain = [sample for sample in mined if isinstance(sample.question.content, str)] or mined[:4]
    assert all(one.found == (one.without > 0) for one in JudgeEvaluator(model).confidences(plain, [[] for _ in plain]))


def test_processes_that_share_a_selection_assess_each_question_once_and_report_them_all(tmp_path: FilePath) -> None:
    samples, asked = questions(7), list[str]()
    pool = {one.question.key: [Rationale("solver", 0, f"good {one.question.key}")] for one in samples}

    class Counting(KnownConfidence):
        def confidences(self, samples: Sequence[Sample], rationales: Sequence[Sequence[str]]) -> list[Confidence]:
            asked.extend(sample.question.key for sample in samples)
            return super().confidences(samples, rationales)

    together(
        lambda processes: assess_pool(
            samples, pool, Counting(), tmp_path, Margins(), identity="known", processes=processes
        )
    )
    assert sorted(asked) == [f"q{index}" for index in range(7)]
    assert len(list(tmp_path.glob("part-*.parquet"))) == 2
    assert json.loads((tmp_path / "report.json").read_text())["worker"]["solver"]["kept"] == 7


def test_a_query_draws_by_gain_and_one_that_kept_nothing_is_taught_to_stop() -> None:
    found = [
        assessed("a", 2.0, "two"),
        assessed("a", 1.0, "one"),
        assessed("a", -1.0, "worse"),
        assessed("b", -1.0, "bad"),
    ]
    kept = kept_rationales(found, lambda one: one.gain > 0, temperature=1.0, unhelped="stop")
    assert kept["a"].texts == ("two", "one")
    assert kept["a"].weights == pytest.approx((np.e / (1 + np.e), 1 / (1 + np.e)))
    rng = np.random.default_rng(0)
    drawn = [kept["a"].draw(rng) for _ in range(1000)]
    assert drawn.count("two") == pytest.approx(731, abs=45)
    assert kept["b"].draw(rng) is None
    evenly = kept_rationales(found, lambda _: True, temperature=float("inf"), unhelped="stop")
    assert evenly["a"].weights == pytest.approx((1 / 3,) * 3)


def test_mined_negatives_never_answer_and_the_hardest_come_first(
    digits: Digits, mined: Sequence[Sample], model: Checkpoint
) -> None:
    bank = TargetBank(digits.samples, model)
    for before, after in zip(digits.samples, mined, strict=True):
        new = after.negatives[len(before.negatives) :]
        assert len(new) == 5
        assert not any(after.wanted in negative.labels for negative in after.negatives)
        query_D = F.normalize(state(model, query_row(after.question, model.rows)), dim=0).numpy()
        similarity = [float(bank.embeddings_CD[bank.index(target)] @ query_D) for target in new]
        wrong = [index for index, target in enumerate(bank.targets) if after.wanted not in target.labels]
        best = sorted((float(bank.embeddings_CD[index] @ query_D) for index in wrong), reverse=True)
        assert similarity[:3] == pytest.approx(best[:3], abs=1e-5)


def test_a_target_too_like_the_right_one_is_taken_for_an_unlabelled_right_one(
    digits: Digits, model: Checkpoint
) -> None:
    bank = TargetBank(digits.samples, model)
    for sample in mine_negatives(digits.samples, bank, model, hard=500, share_of_positive=0.9):
        query_D = F.normalize(state(model, query_row(sample.question, model.rows)), dim=0).numpy()
        own = float(bank.embeddings_CD[bank.index(sample.target)] @ query_D)
        known = digits.samples[[one.question.key for one in digits.samples].index(sample.question.key)].negatives
        for negative in sample.negatives[len(known) :]:
            assert float(bank.embeddings_CD[bank.index(negative)] @ query_D) <= 0.9 * own + 1e-6


def together(work: Callable[[Processes], object]) -> None:
    """Do a job as two processes share it, each a thread here."""
    barrier: Any = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda index: work(Processes(index, 2, barrier.wait)), range(2)))


def one_by_one(samples: Sequence[Sample], bank: TargetBank, queries_QD: Any, share: float) -> list[list[int]]:
    """The negatives of every question, 3 hard and 4 even, each from a sort of all targets: what mining must equal."""
    rng, found = np.random.default_rng(), list[list[int]]()
    for index, (sample, query_D) in enumerate(zip(samples, queries_QD, strict=True)):
        rng = rng if index % 10 else np.random.default_rng([0, index])  # of a block
        similarity_C = bank.embeddings_CD @ query_D
        wrong_C = np.array([sample.wanted not in target.labels for target in bank.targets])
        usable = np.flatnonzero(wrong_C & (similarity_C <= share * similarity_C[bank.index(sample.target)]))
        hard = usable[np.argsort(-similarity_C[usable], kind="stable")[:3]]
        others = np.setdiff1d(np.flatnonzero(wrong_C), hard)
        found.append([*hard.tolist(), *rng.choice(others, size=min(4, len(others)), replace=False).tolist()])
    return found


def test_mining_in_shards_and_blocks_finds_what_a_sort_of_all_targets_finds(
    digits: Digits, model: Checkpoint, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embed_rows(model, [query_row(sample.question, model.rows) for sample in digits.samples])
    monkeypatch.setattr(bank_module, "SHARD", 20)
    monkeypatch.setattr(mining, "BLOCK", 10)
    bank = TargetBank(digits.samples, model, tmp_path / "targets.npy")
    done: list[Sequence[Sample]] = []

    def mine(processes: Processes) -> None:
        options: Any = {"hard": 3, "even": 4, "share_of_positive": 0.9, "store": tmp_path / "q.npy"}
        done.append(mine_negatives(digits.samples, bank, model, **options, processes=processes))

    together(mine)
    mined = done[0]
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), whole, atol=1e-5)
    expected = one_by_one(digits.samples, bank, whole, 0.9)
    for before, after, rows in zip(digits.samples, mined, expected, strict=True):
        assert [bank.index(target) for target in after.negatives[len(before.negatives) :]] == rows


def test_an_index_of_lists_finds_nearly_all_that_comparing_everything_finds() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 32)).astype(np.float32)
    vectors = centres[rng.integers(40, size=3000)] + 0.5 * rng.standard_normal((3000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (exact, every), (listed, most) = nearest_of(vectors), nearest_of(vectors, exact_up_to=2999)
    assert every == 3000
    assert most == mining.MOST_LOOKED_AT
    (cosine_QK, row_QK), (_, expected_QK) = listed(vectors[:100], 10), exact(vectors[:100], 10)
    np.testing.assert_allclose(cosine_QK[:, 0], 1, atol=1e-5)  # from what is stored, not from 8 bits
    shared = [len(set(row_K) & set(expected_K)) for row_K, expected_K in zip(row_QK, expected_QK, strict=True)]
    assert np.mean(shared) > 9.5


def test_an_even_draw_takes_each_of_the_others_as_often() -> None:
    rng, without = np.random.default_rng(0), np.array([0, 3, 4, 9])
    drawn = np.concatenate([drawn_evenly(10, without, 2, rng) for _ in range(3000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=10), [0, *[1000] * 2, 0, 0, *[1000] * 4, 0], rtol=0.1)
    assert sorted(drawn_evenly(10, without, 50, rng)) == [1, 2, 5, 6, 7, 8]
