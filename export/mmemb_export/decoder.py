"""The decoder as one module, to be traced once and written in three forms (`mmemb_export.forms`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmemb_deploy.bundle import abi
from mmemb_training.model import decoder_forward
from mmemb_training.parts import DecoderPart


class Decoder(DecoderPart):
    """New tokens, which may show images, after a KV cache, which may be empty; no logits without `lm_head`."""

    def __init__(self, language_model: Any, lm_head: nn.Linear | None, *, levels: int) -> None:
        super().__init__(language_model)
        self.lm_head = lm_head
        past = tuple(abi.past_names(len(language_model.layers)))
        self.levels = levels
        counts = abi.MASK, abi.START, abi.LAST
        shown = abi.VISUAL_INDEX, abi.VISUAL_TOKENS, *([abi.DEEPSTACK] if levels else [])
        self.inputs = (abi.TOKEN_IDS, abi.POSITION_IDS, *counts, *shown, *past)
        self.listed = len(past) + (1 if levels else 0)
        made = () if lm_head is None else (abi.LOGITS, *abi.FED_BACK)
        self.outputs = (abi.EMBEDDING, abi.STATE, *made, *abi.present_names(len(language_model.layers)))

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        start: Tensor,
        last: Tensor,
        visual_index: Tensor,
        visual_tokens: Tensor,
        listed: list[Tensor],
    ) -> tuple[Tensor, ...]:
        dtype = self.weight.dtype
        deepstack, past = (listed[0].to(dtype), listed[1:]) if self.levels else (None, listed)
        last_B = last.clamp(min=0)
        state_BD, cache = decoder_forward(
            self.language_model,
            token_ids,
            position_ids,
            mask,
            visual_tokens_VD=visual_tokens.to(dtype),
            visual_index_BS=visual_index,
            deepstack_LVD=deepstack,
            past=list(zip(past[::2], past[1::2], strict=True)),
            last_B=last_B,
        )
        present = (tensor for layer in cache for tensor in layer)
        norm_B1 = torch.linalg.vector_norm(state_BD.float(), dim=-1, keepdim=True)
        embedding_BD = state_BD.float() / norm_B1.clamp_min(1e-12)  # F.normalize would repeat the norm D times first
        if self.lm_head is None:
            return embedding_BD, state_BD.float(), *present
        logits_BW = self.lm_head(state_BD).float()
        next_token_B1 = logits_BW.argmax(dim=-1, keepdim=True)
        next_position_3B1 = torch.gather(position_ids, 2, last_B[None, :, None].expand(3, -1, 1)) + 1
        return embedding_BD, state_BD.float(), logits_BW, next_token_B1, next_position_3B1, start + last + 1, *present
