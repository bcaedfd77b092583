"""Embedder and generator as one module, to be traced and fused for ONNX Runtime."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmemb_deploy.bundle import abi
from mmemb_training.model import decoder_forward, last_state
from mmemb_training.parts import DecoderPart


class Decoder(DecoderPart):
    """New tokens, which may show images, after a KV cache, which may be empty; no logits without `lm_head`."""

    def __init__(self, language_model: Any, lm_head: nn.Linear | None, *, levels: int) -> None:
        super().__init__(language_model)
        self.lm_head = lm_head
        past = tuple(abi.past_names(len(language_model.layers)))
        self.levels = levels
        text = abi.TOKEN_IDS, abi.POSITION_IDS, abi.MASK, abi.LAST, abi.VISUAL_INDEX, abi.VISUAL_TOKENS
        self.inputs = (*text, *([abi.DEEPSTACK] if levels else []), *past)
        self.listed = len(past) + (1 if levels else 0)
        made = (abi.EMBEDDING, abi.STATE) if lm_head is None else (abi.EMBEDDING, abi.STATE, abi.LOGITS)
        self.outputs = (*made, *abi.present_names(len(language_model.layers)))

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        last: Tensor,
        visual_index: Tensor,
        visual_tokens: Tensor,
        listed: list[Tensor],
    ) -> tuple[Tensor, ...]:
        dtype = self.weight.dtype
        deepstack, past = (listed[0].to(dtype), listed[1:]) if self.levels else (None, listed)
        hidden_BSD, cache = decoder_forward(
            self.language_model,
            token_ids,
            position_ids,
            mask,
            visual_tokens_VD=visual_tokens.to(dtype),
            visual_index_BS=visual_index,
            deepstack_LVD=deepstack,
            past=list(zip(past[::2], past[1::2], strict=True)),
        )
        state_BD = last_state(hidden_BSD, last)
        logits = () if self.lm_head is None else (self.lm_head(state_BD).float(),)
        present = (tensor for layer in cache for tensor in layer)
        return F.normalize(state_BD.float(), dim=-1), state_BD.float(), *logits, *present
