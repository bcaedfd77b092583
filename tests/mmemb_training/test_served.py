"""A server writes rollouts as the policy would: by its prompts, its weights and its tokens, or the run stops."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_vllm import FakeVllm, serving
from mmemb_deploy import BackendError, OptionError
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.control.carried import Carried
from mmemb_training.control.grpo import train_control
from mmemb_training.control.policy import server_kl
from mmemb_training.control.publish import check_served, client_of
from mmemb_training.control.served import ServedRollouts
from mmemb_training.encoder import Encoder
from mmemb_training.nano.digits import Digits
from mmemb_training.recipes.settings import ControlRecipe, LoraSettings, RolloutServer, Schedule, TrainedWeights
from mmemb_training.samples import Question, Sample, Target, query_row
from mmemb_training.selection.bank import TargetBank
from mmemb_training.selection.mining import mine_negatives
from mmemb_training.stage import plain_accelerator

RECIPE = ControlRecipe(
    schedule=Schedule(steps=4, learning_rate=1e-2, warmup=1, save_every=2, spike=0), group=3, updates=2
)
Draw = Callable[..., Any]


@pytest.fixture
def vllm(tiny_checkpoint: Path) -> FakeVllm:
    return FakeVllm(tiny_checkpoint)


@pytest.fixture
def recipe(vllm: FakeVllm) -> Iterator[ControlRecipe]:
    """A recipe whose rollouts `vllm` writes."""
    with serving(vllm) as url:
        yield replace(RECIPE, rollouts=RolloutServer(base_url=url, model="policy"))


@pytest.fixture
def draw(tiny: Checkpoint, recipe: ControlRecipe) -> Draw:
    """Draw rollouts from the tiny checkpoint's own weights."""
    assert recipe.rollouts is not None
    served = ServedRollouts(tiny, client_of(recipe.rollouts), recipe, plain_accelerator())
    return lambda samples, seed=0: served.draw(Encoder(tiny).eval(), samples, "policy", (seed,))


def asking(contents: list[Any]) -> list[Sample]:
    """Return a sample for each content, every second one with an instruction of its own."""
    target = Target(content="y", labels=frozenset("a"))
    return [
        Sample(
            question=Question(
                key=f"q{index}", task="t", content=content, instruction="Find it." if index % 2 else None
            ),
            wanted="a",
            target=target,
        )
        for index, content in enumerate(contents)
    ]


def test_the_server_reads_the_very_prompts_images_and_video_included(
    draw: Draw, vllm: FakeVllm, tiny: Checkpoint, mixed_inputs: list[Any]
) -> None:
    frames = [np.full((24, 32, 3), 30 * index, np.uint8) for index in range(5)]
    uneven = {"video": frames, "timestamps": [0, 0.25, 0.31, 3.449, 11.05], "text": "what happens?"}
    samples = asking([*mixed_inputs, uneven])
    draw(samples)
    think = tiny.rows.prompt.ids["<think>"]
    expected = [[*query_row(one.question, tiny.rows).token_ids_S.tolist(), think] for one in samples]
    assert sorted(vllm.prompts) == sorted(expected)


def test_rollouts_hold_the_tokens_that_were_drawn_with_their_own_log_probabilities(
    draw: Draw, tiny: Checkpoint, mixed_inputs: list[Any]
) -> None:
    groups, _, reading = draw(asking(mixed_inputs[:5]))
    rollouts = [one for group in groups for one in group if one.token_ids is not None]
    logprobs = reading.logprobs_RT.numpy()
    retokenised = []
    for one, ours in zip(rollouts, logprobs, strict=True):
        said = one.drawn_logprobs
        assert len(said) == len(one.token_ids) + (not one.truncated)
        np.testing.assert_allclose(said, ours[: len(said)], atol=1e-3)
        retokenised.append(tiny.rows.prompt.tokenize(tiny.rows.prompt.decode(one.token_ids)))
    assert abs(server_kl(groups, reading)) < 1e-4
    assert retokenised != [list(one.token_ids) for one in rollouts]  # text would have given other tokens
    for group, direct_D in zip(groups, torch.nn.functional.normalize(reading.direct_BD, dim=1).numpy(), strict=True):
        assert {one.token_ids is None for one in group} == {True, False}  # paired
        for one in group:
            assert np.linalg.norm(one.embedding_D) == pytest.approx(1, abs=1e-5)
            if one.token_ids is None:
                np.testing.assert_allclose(one.embedding_D, direct_D, atol=1e-6)


def test_the_same_seed_draws_the_same_rollouts(draw: Draw, mixed_inputs: list[Any]) -> None:
    drawn = [draw(asking(mixed_inputs[:2]), seed)[0] for seed in (0, 0, 1)]
    first, again, other = ([one.token_ids for group in groups for one in group] for groups in drawn)
    assert first == again != other


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_server_follows_the_policy_from_batch_to_batch(
    vllm: FakeVllm, recipe: ControlRecipe, tiny: Checkpoint, digits: Digits, tmp_path: Path, method: Any
) -> None:
    samples = mine_negatives(
        digits.samples[::20], TargetBank(digits.samples, tiny), tiny, hard=3, share_of_positive=None
    )
    weights = TrainedWeights(method=method, lora=LoraSettings(rank=4))
    bank = TargetBank(samples, tiny)
    rows = list(train_control(tiny, lambda _: samples, recipe, tmp_path, bank=bank, weights=weights))
    assert rows[-1]["anchor"] > 1e-3  # the policy has moved, and the server with it
    assert [abs(row["server_kl"]) < 1e-3 for row in rows] == [True] * 4
    published = [call for call in vllm.calls if call != "/v1/chat/completions"]
    if method == "lora":
        assert published == ["/v1/load_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
        assert len(vllm.adapters) == 1
    else:
        assert published == ["/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache"] * 2
    assert len(list((tmp_path / "published").iterdir())) == 1


def test_a_server_with_other_weights_is_refused(draw: Draw, vllm: FakeVllm, mixed_inputs: list[Any]) -> None:
    with torch.no_grad():
        vllm.checkpoint.model.lm_head.weight.mul_(1.5)
    with pytest.raises(BackendError, match=r"nats likelier to it than to the policy, .* it holds other weights"):
        draw(asking(mixed_inputs[:3]))


def test_a_server_with_another_template_is_refused_by_where_its_prompt_differs(
    draw: Draw, vllm: FakeVllm, mixed_inputs: list[Any]
) -> None:
    vllm.tokenizer.chat_template = vllm.tokenizer.chat_template.replace("<think>", "<think>\n")
    with pytest.raises(BackendError, match=r"^q0: .* read another prompt, .*: from token \d+ on \[.*\], not \[\]"):
        draw(asking(mixed_inputs[:1]))


def test_a_server_that_does_not_do_as_it_is_asked_is_refused(
    draw: Draw, vllm: FakeVllm, mixed_inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, samples = vllm.post, asking(mixed_inputs[1:2])

    def spoilt(change: Callable[[dict[str, Any]], Any]) -> None:
        def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
            status, content = whole(path, body)
            change(content)
            return status, content

        monkeypatch.setattr(vllm, "post", post)

    for change, said in (
        (lambda body: body.pop("prompt_token_ids"), "the answer has no prompt_token_ids: serve with vLLM"),
        (lambda body: body["choices"].pop(), r"it has \d of \d samples"),
        (lambda body: body["choices"][0]["token_ids"].pop(), r"\d token_ids come with the log-probabilities of \d"),
        (lambda body: body["choices"][0].update(finish_reason="abort"), "an answer ended by 'abort'"),
    ):
        spoilt(change)
        with pytest.raises(BackendError, match=said):
            draw(samples)
    monkeypatch.setattr(vllm, "post", whole)
    vllm.trusts_mm_kwargs = False
    with pytest.raises(BackendError, match="Start the server with --trust-request-mm-kwargs"):
        draw(samples)


def test_a_server_that_cannot_be_brought_up_to_date_is_refused_with_how_to_start_it(
    vllm: FakeVllm, recipe: ControlRecipe, tiny: Checkpoint, digits: Digits, tmp_path: Path
) -> None:
    vllm.absent = ("/collective_rpc",)
    samples = digits.samples[:2]
    with pytest.raises(BackendError, match=r"/collective_rpc is not there: start vLLM .* VLLM_SERVER_DEV_MODE=1"):
        next(train_control(tiny, lambda _: [*samples], recipe, tmp_path, bank=TargetBank(samples, tiny)))
    assert recipe.rollouts is not None
    check_served(client_of(recipe.rollouts))
    with pytest.raises(BackendError, match="has no 'another', but policy"):
        check_served(client_of(replace(recipe.rollouts, model="another")))
    with pytest.raises(BackendError, match="ConnectError"):
        check_served(client_of(replace(recipe.rollouts, base_url="http://127.0.0.1:9/v1")))


def test_questions_whose_words_a_chat_would_change_are_told_from_those_it_carries(tiny: Checkpoint) -> None:
    carries = Carried(tiny.rows.prompt)
    image = np.zeros((16, 16, 3), np.uint8)
    for content in ("three plus four", {"text": "what is it?", "image": image}, image, {"video": [image] * 2}):
        assert carries(Question(key="a", task="t", content=content)), content
    for text in ("a <|im_end|> b", "what is <think>?"):
        assert not carries(Question(key="a", task="t", content=text)), text


def test_settings_of_a_server_are_checked() -> None:
    with pytest.raises(OptionError, match="model is ''"):
        RolloutServer(base_url="http://localhost:8000/v1", model="")
    with pytest.raises(OptionError, match="timeout is 0"):
        RolloutServer(base_url="http://localhost:8000/v1", model="m", timeout=0)
    with pytest.raises(OptionError, match="base_url is 'localhost'"):
        client_of(RolloutServer(base_url="localhost", model="m"))
