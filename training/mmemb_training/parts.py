"""The four parts of the model as modules that read and write the tensors of `mmemb_deploy.bundle.abi`.

Floats go in and out as float32, whatever the type of the weights; the KV cache alone has the weights' type.

Export traces them into graphs; `mmemb_training.runtime` runs them as they are. Both decoder parts hold the same
language model under the same names, so that their graphs can share one weight file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmemb_deploy.bundle import abi
from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.preprocess import VisionSpec
from mmemb_training.model import decoder_forward, vision_forward


class Part(nn.Module):
    """A module with named tensors: `inputs` in the order of `forward`, the last `listed` of them as one list."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    listed: int = 0

    @property
    def weight(self) -> Tensor:
        """A weight that no adapter replaces: it says the type and the device of the part."""
        raise NotImplementedError


class Vision(Part):
    """Images of one shape to visual tokens and DeepStack levels."""

    inputs = (
        abi.PIXELS,
        abi.SEGMENT_INDEX,
        abi.INTERPOLATION_INDEX,
        abi.INTERPOLATION_WEIGHT,
        abi.ROTARY_COS,
        abi.ROTARY_SIN,
    )

    def __init__(self, visual: Any, spec: VisionSpec) -> None:
        super().__init__()
        self.visual, self.spec = visual, spec
        levels = len(visual.deepstack_visual_indexes)
        self.outputs = (abi.VISUAL_TOKENS, abi.DEEPSTACK) if levels else (abi.VISUAL_TOKENS,)

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.visual.patch_embed.proj.weight
        return found

    def forward(
        self,
        pixels: Tensor,
        segment_index: Tensor,
        index: Tensor,
        weight: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
    ) -> tuple[Tensor, ...]:
        tokens_NMD, deepstack_LNMD = vision_forward(
            self.visual, self.spec, pixels, segment_index, index, weight, rotary_cos, rotary_sin
        )
        return (tokens_NMD.float(), deepstack_LNMD.float())[: len(self.outputs)]


class DecoderPart(Part):
    """A part that holds the language model, under the one name by which graphs share its weights."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.language_model.norm.weight
        return found


class Prefill(DecoderPart):
    """Prompts to their direct embeddings, the gate's input and the KV cache."""

    def __init__(self, language_model: Any, *, levels: int) -> None:
        super().__init__(language_model)
        text = abi.TOKEN_IDS, abi.POSITION_IDS, abi.MASK, abi.VISUAL_INDEX, abi.VISUAL_TOKENS
        self.inputs = (*text, abi.DEEPSTACK) if levels else text
        self.outputs = abi.EMBEDDING, abi.STATE, *abi.present_names(len(language_model.layers))

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        visual_index: Tensor,
        visual_tokens: Tensor,
        deepstack: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        dtype = self.weight.dtype
        state_BD, cache = decoder_forward(
            self.language_model,
            token_ids,
            position_ids,
            mask,
            last_B=mask.sum(dim=1) - 1,
            visual_tokens_VD=visual_tokens.to(dtype),
            visual_index_BS=visual_index,
            deepstack_LVD=None if deepstack is None else deepstack.to(dtype),
        )
        state_BD = state_BD.float()
        return F.normalize(state_BD, dim=-1), state_BD, *(tensor for layer in cache for tensor in layer)


class Decode(DecoderPart):
    """New tokens after a KV cache to logits, embeddings and the longer cache."""

    def __init__(self, language_model: Any, lm_head: nn.Linear) -> None:
        super().__init__(language_model)
        self.lm_head = lm_head
        past = tuple(abi.past_names(len(language_model.layers)))
        self.inputs = abi.TOKEN_IDS, abi.POSITION_IDS, abi.MASK, *past
        self.listed = len(past)
        self.outputs = abi.LOGITS, abi.EMBEDDING, *abi.present_names(len(language_model.layers))

    def forward(self, token_ids: Tensor, position_ids: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        layers = list(zip(past[::2], past[1::2], strict=True))
        last_B = mask[:, past[0].shape[2] :].sum(dim=1) - 1
        state_BD, cache = decoder_forward(
            self.language_model, token_ids, position_ids, mask, past=layers, last_B=last_B
        )
        logits_BW = self.lm_head(state_BD).float()
        return logits_BW, F.normalize(state_BD.float(), dim=-1), *(tensor for layer in cache for tensor in layer)


class Gate(Part):
    """The model's own choice between two tokens: sigmoid(state @ (w_think - w_stop)), exactly sliced."""

    inputs = (abi.STATE,)
    outputs = (abi.SCORE,)

    def __init__(self, lm_head: nn.Linear, think: int, stop: int) -> None:
        super().__init__()
        self.rows_2D = nn.Parameter(lm_head.weight[[think, stop]].detach().clone())

    @property
    def weight(self) -> Tensor:
        return self.rows_2D

    def forward(self, state: Tensor) -> tuple[Tensor]:
        think_B, stop_B = (state.float() @ self.rows_2D.float().T).unbind(-1)
        return (torch.sigmoid(think_B - stop_B),)


def parts(model: Any, spec: VisionSpec, marker_ids: dict[str, int]) -> dict[str, Part]:
    """Return the parts of a `Qwen3VLForConditionalGeneration` by the names of `abi.GRAPHS`.

    Without `<|disc_emb|>` among its markers it is an embedding model, of `abi.FAST_GRAPHS` alone.
    """
    visual, language_model = model.model.visual, model.model.language_model
    fast: dict[str, Part] = {
        abi.VISION: Vision(visual, spec),
        abi.EMBEDDER: Prefill(language_model, levels=len(visual.deepstack_visual_indexes)),
    }
    if prompts.DISC_EMB not in marker_ids:
        return fast
    return fast | {
        abi.GATE: Gate(model.lm_head, marker_ids[prompts.THINK], marker_ids[prompts.STOP]),
        abi.GENERATOR: Decode(language_model, model.lm_head),
    }
