"""Rows to tensors, and the model's embeddings for them.

Axes: B rows, T padded tokens, D hidden size, V visual tokens and the zero row, L DeepStack levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmemb_deploy.preprocess import VisionSpec, Visual, patches, vision_tables
from mmemb_deploy.rows import Batch, by_grid
from mmemb_training.model import decoder_forward, vision_forward


def encode_visuals(model: Any, visuals: Sequence[Visual], spec: VisionSpec) -> tuple[Tensor, Tensor]:
    """Return the visual tokens (V, D) of a batch and their DeepStack levels (L, V, D), behind a row of zeros."""
    visual = model.model.visual
    hidden = model.config.text_config.hidden_size
    levels = len(visual.deepstack_visual_indexes)
    tokens: list[Tensor] = [torch.zeros(1, hidden)] * (len(visuals) + 1)
    deepstack: list[Tensor] = [torch.zeros(levels, 1, hidden)] * (len(visuals) + 1)
    for grid, places in by_grid(visuals).items():
        tables = vision_tables(*grid, spec)
        patches_NPF = torch.from_numpy(np.stack([patches(visuals[place], spec) for place in places]))
        tokens_NMD, deepstack_LNMD = vision_forward(
            visual,
            patches_NPF,
            torch.from_numpy(tables.interpolation_index_P4),
            torch.from_numpy(tables.interpolation_weight_P4),
            torch.from_numpy(tables.rotary_cos_PD),
            torch.from_numpy(tables.rotary_sin_PD),
        )
        for row, place in enumerate(places):
            tokens[place + 1] = tokens_NMD[row]
            deepstack[place + 1] = deepstack_LNMD[:, row]
    return torch.cat(tokens), torch.cat(deepstack, dim=1)


def encode_batch(model: Any, batch: Batch, spec: VisionSpec) -> Tensor:
    """Return the states after the final norm, (B, T, D)."""
    tokens_VD, deepstack_LVD = encode_visuals(model, batch.visuals, spec)
    hidden_BTD, _ = decoder_forward(
        model.model.language_model,
        torch.from_numpy(batch.token_ids_BT),
        torch.from_numpy(batch.position_ids_3BT),
        torch.from_numpy(batch.mask_BT),
        visual_tokens_VD=tokens_VD,
        visual_index_BS=torch.from_numpy(batch.visual_index_BT),
        deepstack_LVD=deepstack_LVD,
    )
    return hidden_BTD
