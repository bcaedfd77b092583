"""The joint loss is the sum that its docstring states, whatever the chunks, and however its gradients are taken."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.rows import collate
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.encoder import Encoder
from mmemb_training.grad_cache import backward
from mmemb_training.joint import JointStep, Lesson
from mmemb_training.lora import add_lora
from mmemb_training.losses import info_nce
from mmemb_training.prefill import prefill
from mmemb_training.recipes.settings import LoraSettings, Objective
from mmemb_training.samples import query_row, target_row
from mmemb_training.stage import plain_accelerator

OBJECTIVE = Objective(lambda_g=0.7, lambda_d=0.3, dims=(48, 24))


def step(lessons: Sequence[Lesson], checkpoint: Checkpoint, chunks: int, objective: Objective = OBJECTIVE) -> JointStep:
    return JointStep(lessons, checkpoint.rows, objective, hard_negatives=2, query_chunks=chunks, target_chunks=chunks)


def gradients(
    lessons: Sequence[Lesson], checkpoint: Checkpoint, encoder: Encoder, *, chunks: int, cached: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    accelerator: Accelerator = plain_accelerator()
    share = step(lessons, checkpoint, chunks)
    encoder.zero_grad()
    loss, _ = backward(
        encoder, share.chunks, lambda readings: share.loss(readings, accelerator), accelerator, cached=cached
    )
    return loss.item(), {
        name: weight.grad.clone() for name, weight in encoder.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("chunks", [1, 3])
def test_cached_gradients_equal_the_plain_ones(lessons: list[Lesson], tiny: Checkpoint, chunks: int) -> None:
    encoder = Encoder(tiny).train()
    plain_loss, plain = gradients(lessons[:20], tiny, encoder, chunks=1, cached=False)
    loss, cached = gradients(lessons[:20], tiny, encoder, chunks=chunks, cached=True)
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert plain.keys() == cached.keys()
    for name, gradient in plain.items():
        assert float((cached[name] - gradient).abs().max()) <= 1e-5 * scale, name


def test_cached_gradients_are_exact_with_dropout_too(lessons: list[Lesson], tiny: Checkpoint) -> None:
    add_lora(tiny, LoraSettings(rank=4, dropout=0.3))
    encoder = Encoder(tiny).train()
    torch.manual_seed(5)
    plain_loss, plain = gradients(lessons[:12], tiny, encoder, chunks=2, cached=False)
    torch.manual_seed(5)
    loss, cached = gradients(lessons[:12], tiny, encoder, chunks=2, cached=True)
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for name, gradient in plain.items():
        assert float((cached[name] - gradient).abs().max()) <= 1e-5 * scale, name


def copies(states_ND: torch.Tensor) -> torch.Tensor:
    """Return how often each of the states is among them."""
    return ((states_ND[:, None] - states_ND).abs().amax(dim=2) < 1e-4).sum(dim=1)


def test_the_loss_is_the_sum_of_its_parts_row_by_row(lessons: list[Lesson], tiny: Checkpoint) -> None:
    model, ids = tiny.model, tiny.rows.prompt.ids
    chosen = lessons[4:16]
    share = step(chosen, tiny, chunks=2)
    encoder = Encoder(tiny).eval()
    with torch.no_grad():
        readings = [encoder(chunk.rows, chunk.paths) for chunk in share.chunks]
        loss, terms = share.loss(readings, plain_accelerator())
        direct, reasoned, logprobs, decisions = [], [], [], []
        for lesson in chosen:
            row = query_row(lesson.sample.question, tiny.rows)
            path = (
                [] if lesson.rationale is None else tiny.rows.prompt.path(tiny.rows.prompt.tokenize(lesson.rationale))
            )
            hidden_SD = prefill(model, collate([row.extended(path)], 0), tiny.vision)[0][0]
            logp_SV = F.log_softmax(model.lm_head(hidden_SD), dim=-1)
            direct.append(hidden_SD[row.length - 1])
            decisions.append(-logp_SV[row.length - 1, ids[prompts.THINK if path else prompts.STOP]])
            if path:
                reasoned.append(hidden_SD[-1])
                logprobs += [-logp_SV[row.length + at, token] for at, token in enumerate(path[1:-1])]
        targets = [lesson.sample.target for lesson in chosen]
        targets += [negative for lesson in chosen for negative in lesson.sample.negatives]
        candidates_CD = torch.stack(
            [prefill(model, collate([target_row(one, tiny.rows)], 0), tiny.vision)[0][0, -1] for one in targets]
        )
    once = {"copies_Q": copies(torch.stack(direct)), "copies_C": copies(candidates_CD)}
    relevant_QC = torch.tensor([[lesson.sample.wanted in target.labels for target in targets] for lesson in chosen])
    reasons_Q = torch.tensor([lesson.rationale is not None for lesson in chosen])
    assert 0 < int(reasons_Q.sum()) < len(chosen)
    expected = {
        "direct": info_nce(torch.stack(direct), candidates_CD, relevant_QC, 0.02, OBJECTIVE.dims, **once),
        "reasoned": info_nce(
            torch.stack(reasoned),
            candidates_CD,
            relevant_QC[reasons_Q],
            0.02,
            OBJECTIVE.dims,
            copies_C=once["copies_C"],
        ),
        "rationale": torch.stack(logprobs).mean(),
        "decision": torch.stack(decisions).mean(),
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-3), name
    total = expected["reasoned"] + 0.7 * (expected["rationale"] + expected["decision"]) + 0.3 * expected["direct"]
    assert loss.item() == pytest.approx(total.item(), rel=1e-3)


def test_a_step_without_any_rationale_teaches_to_stop(lessons: list[Lesson], tiny: Checkpoint) -> None:
    silent = [Lesson(lesson.sample, None) for lesson in lessons[:6]]
    share = step(silent, tiny, chunks=2)
    encoder = Encoder(tiny).train()
    loss, terms = share.loss([encoder(chunk.rows, chunk.paths) for chunk in share.chunks], plain_accelerator())
    assert terms["reasoned"].item() == terms["rationale"].item() == 0
    assert terms["decision"].item() > 0
    assert torch.isfinite(loss)


def test_a_lesson_that_decides_nothing_teaches_nothing_of_its_decision(lessons: list[Lesson], tiny: Checkpoint) -> None:
    encoder, chosen = Encoder(tiny).eval(), [Lesson(one.sample, None) for one in lessons[:4]]

    def terms(lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
        share = step(lessons, tiny, chunks=1)
        with torch.no_grad():
            return share.loss([encoder(chunk.rows, chunk.paths) for chunk in share.chunks], plain_accelerator())[1]

    alone, both = terms(chosen[:1]), terms([chosen[0], replace(chosen[1], decides=False)])
    assert both["decision"].item() == pytest.approx(alone["decision"].item(), rel=1e-4)
    assert both["direct"].item() != pytest.approx(alone["direct"].item(), rel=1e-4)
    assert terms([replace(one, decides=False) for one in chosen])["decision"] == 0


def test_what_reads_the_same_as_an_answer_is_no_negative_and_copies_count_once(
    lessons: list[Lesson], tiny: Checkpoint
) -> None:
    chosen = [Lesson(one.sample, None) for one in lessons[:3]]
    other = replace(chosen[0].sample, target=replace(chosen[0].sample.target, labels=frozenset({"the same, renamed"})))
    other = replace(other, question=lessons[20].sample.question, wanted="the same, renamed", negatives=())
    chosen = [*chosen, Lesson(other, None), *chosen[1:2] * 3]
    encoder, share = Encoder(tiny).eval(), step(chosen, tiny, chunks=1)
    with torch.no_grad():
        readings = [encoder(chunk.rows, chunk.paths) for chunk in share.chunks]
        _, terms = share.loss(readings, plain_accelerator())
    # By hand: the same as of distinct questions and targets, each copy of which has the loss of its first.
    queries, targets = (reading.direct_BD for reading in readings)
    relevant, copies_Q, copies_C = share._relevance(plain_accelerator())  # pyright: ignore[reportPrivateUsage]
    assert sorted(copies_Q.tolist()) == [1, 1, 1, 4, 4, 4, 4]
    for place, one in enumerate(targets):
        same = (targets - one).abs().amax(dim=1) < 1e-5
        assert int(copies_C[place]) == int(same.sum())
        assert (relevant[:, same] == relevant[:, same][:, :1]).all()
    expected = info_nce(queries, targets, relevant, 0.02, OBJECTIVE.dims, copies_Q=copies_Q, copies_C=copies_C)
    assert terms["direct"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_tokens_of_which_the_model_is_certain_count_among_the_others(lessons: list[Lesson], tiny: Checkpoint) -> None:
    share, encoder = step(lessons[4:16], tiny, chunks=1), Encoder(tiny).eval()
    with torch.no_grad():
        queries, targets = [encoder(chunk.rows, chunk.paths) for chunk in share.chunks]
    certain_RT = torch.zeros_like(queries.logprobs_RT)  # the logarithm of 1
    certain_RT[0, 0] = -6
    _, terms = share.loss([queries._replace(logprobs_RT=certain_RT), targets], plain_accelerator())
    rationales = [lesson.rationale for lesson in lessons[4:16] if lesson.rationale is not None]
    words = sum(len(tiny.rows.prompt.tokenize(rationale)) + 1 for rationale in rationales)
    assert terms["rationale"].item() == pytest.approx(6 / words)
