"""One prefill and any number of rationales after it equal a full forward pass over each whole sequence."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import Visual
from mmemb_deploy.inputs.rows import collate
from mmemb_training import encoder as module
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.encoder import Continuation, Encoder
from mmemb_training.model import checkpoint_layers, decoder_forward
from mmemb_training.prefill import encode_visuals, prefill

RATIONALES: tuple[list[int], ...] = ([5, 6, 7], [], [9, 8, 7, 6, 5, 4, 3])


def test_paths_that_share_a_prefill_equal_whole_sequences(tiny: Checkpoint, mixed_inputs: list[Any]) -> None:
    rows = [tiny.rows.row(parse(content), "Find it.") for content in mixed_inputs]
    paths = [Continuation(index, token_ids) for index in (3, 1, 4) for token_ids in RATIONALES]
    ids, encoder = tiny.rows.prompt.ids, Encoder(tiny).eval()
    with torch.no_grad():
        reading = encoder(rows, paths)
        for index, path in enumerate(paths):
            tokens = tiny.rows.prompt.path(path.token_ids)
            whole = collate([rows[path.prompt].extended(tokens)], 0)
            hidden_SD = prefill(tiny.model, whole, tiny.vision)[0][0]
            start = rows[path.prompt].length
            logp_SV = F.log_softmax(tiny.model.lm_head(hidden_SD), dim=-1)
            expected = [logp_SV[start + at, token] for at, token in enumerate(tokens[1:-1])]
            torch.testing.assert_close(reading.reasoned_RD[index], hidden_SD[-1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(reading.direct_BD[path.prompt], hidden_SD[start - 1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                reading.logprobs_RT[index, : len(expected)], torch.stack(expected), rtol=1e-4, atol=1e-4
            )
            assert not reading.logprobs_RT[index, len(expected) :].any()
            decision = logp_SV[start - 1, [ids[prompts.THINK], ids[prompts.STOP]]]
            torch.testing.assert_close(reading.decision_B2[path.prompt], decision, rtol=1e-4, atol=1e-4)


def test_passes_of_bounded_size_give_the_states_and_logits_of_one(
    tiny: Checkpoint, mixed_inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [tiny.rows.row(parse(content), "") for content in mixed_inputs]
    paths = [Continuation(index, token_ids) for index in (0, 2, 0, 3, 1) for token_ids in RATIONALES]
    continued = [(path.prompt, [3, *path.token_ids]) for path in paths]
    encoder, read = Encoder(tiny).eval(), list[tuple[int, int]]()

    def counted(*args: Any, **options: Any) -> Any:
        read.append(tuple(args[3].shape))
        return decoder_forward(*args, **options)

    with torch.no_grad():
        reading = encoder(rows, paths)
        logits_R2 = encoder.next_logits(rows, continued, [4, 9])
        monkeypatch.setattr(module, "decoder_forward", counted)
        monkeypatch.setattr(module, "PROMPT_TOKENS", 2 * rows[0].length)
        monkeypatch.setattr(module, "CONTEXT_TOKENS", 150)
        direct_BD, reasoned_RD = encoder.embed(rows, paths)
        torch.testing.assert_close(encoder.next_logits(rows, continued, [4, 9]), logits_R2, rtol=1e-4, atol=1e-5)
    assert all(count * context <= 150 for count, context in read)
    assert sum(count for count, _ in read) == 2 * len(paths)
    torch.testing.assert_close(direct_BD, reading.direct_BD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reasoned_RD, reading.reasoned_RD, rtol=1e-4, atol=1e-5)


def test_prompts_are_read_by_kernels_that_take_no_mask(
    tiny: Checkpoint, mixed_inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [tiny.rows.row(parse(content), "") for content in mixed_inputs]
    masks = list[Any]()
    attend: Any = F.scaled_dot_product_attention

    def flash(*args: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        masks.append(attn_mask)  # FlashAttention refuses one on a GPU; torch's kernel for CPUs would take it
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attended: torch.Tensor = attend(*args, attn_mask=attn_mask, **options)
            return attended

    with torch.no_grad():
        expected = [Encoder(tiny).eval()([row], [])[0][0] for row in rows]
        monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
        direct_BD = Encoder(tiny).eval()(rows, []).direct_BD
    assert masks.count(None) == len(masks) > 0
    torch.testing.assert_close(direct_BD, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_checkpointed_layers_give_the_same_gradients(tiny: Checkpoint, mixed_inputs: list[Any]) -> None:
    rows = [tiny.rows.row(parse(content), "") for content in mixed_inputs]
    encoder = Encoder(tiny).train()

    def gradients() -> list[torch.Tensor]:
        encoder.zero_grad()
        torch.stack(
            [value.square().sum() for value in encoder(rows, [Continuation(1, [5, 6]), Continuation(4, [7])])]
        ).sum().backward()
        return [weight.grad.clone() for weight in encoder.parameters() if weight.grad is not None]

    kept = gradients()
    checkpoint_layers(tiny.model)
    for before, after in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_batch_without_images_still_has_a_gradient_for_every_weight(tiny: Checkpoint) -> None:
    rows = [tiny.rows.row(parse(text), "") for text in ("one", "two and three")]
    torch.stack([value.sum() for value in Encoder(tiny).train()(rows, [Continuation(0, [5])])]).sum().backward()
    assert all(weight.grad is not None for weight in tiny.model.parameters())
    assert not any(weight.grad.any() for weight in tiny.model.model.visual.parameters())


def test_images_of_all_shapes_are_encoded_together_as_they_are_alone(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, spec, visual = np.random.default_rng(0), tiny.vision, tiny.model.model.visual
    sides = [(2, 2), (4, 2), (2, 2), (2, 4), (6, 2), (2, 4)]  # visual tokens along height and width: of 4, 8 and 12
    visuals = [
        Visual(rng.integers(0, 256, (1, rows * spec.factor, columns * spec.factor, 3), np.uint8), grid, rows * columns)
        for rows, columns in sides
        for grid in [(rows * spec.merge_size, columns * spec.merge_size)]
    ]
    linear, attend, runs, calls = visual.blocks[0].mlp.forward, F.scaled_dot_product_attention, list[int](), list[int]()

    def counted(states: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        found: torch.Tensor = linear(states)
        return found

    def flash(*args: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend(*args)

    with torch.no_grad():
        alone = [encode_visuals(tiny.model, [one], spec) for one in visuals]
        monkeypatch.setattr(visual.blocks[0].mlp, "forward", counted)
        monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
        tokens_VD, deepstack_LVD = encode_visuals(tiny.model, visuals, spec)
    assert len(runs) == 1
    assert calls == [2, 3, 1] * len(visual.blocks)
    expected = torch.cat([tokens[1:] for tokens, _ in alone]), torch.cat([levels[:, 1:] for _, levels in alone], dim=1)
    torch.testing.assert_close((tokens_VD[1:], deepstack_LVD[:, 1:]), expected, rtol=1e-4, atol=1e-5)
