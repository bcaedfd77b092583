"""Rows to tensors: the visuals of a batch through the vision tower, and a batch through the decoder.

Axes: B rows, S padded tokens, D hidden size, V visual tokens and the zero row, L DeepStack levels, N images of a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmemb_deploy.inputs.preprocess import VisionSpec, Visual, pixel_segments, vision_tables
from mmemb_deploy.inputs.rows import Batch, by_shape
from mmemb_training.model import KeyValue, decoder_forward, packed_vision_forward


def prefill(model: Any, batch: Batch, spec: VisionSpec, *, keep: bool = True) -> tuple[Tensor, list[KeyValue]]:
    """Return the states after the final norm, (B, S, D), and every layer's cache, none without `keep`.

    No mask is passed: rows are padded on the right, where no token of theirs attends to.
    """
    tokens_VD, deepstack_LVD = encode_visuals(model, batch.visuals, spec)
    device = tokens_VD.device
    return decoder_forward(
        model.model.language_model,
        torch.from_numpy(batch.token_ids_BT).to(device),
        torch.from_numpy(batch.position_ids_3BT).to(device),
        None,
        visual_tokens_VD=tokens_VD,
        visual_index_BS=torch.from_numpy(batch.visual_index_BT).to(device),
        deepstack_LVD=deepstack_LVD,
        keep=keep,
    )


def encode_visuals(model: Any, visuals: Sequence[Visual], spec: VisionSpec) -> tuple[Tensor, Tensor]:
    """Return the visual tokens (V, D) of a batch and their DeepStack levels (L, V, D), behind a row of zeros.

    Images of all shapes are encoded together. Where gradients are wanted, a batch without an image encodes a blank that
    no token shows: its gradient is zero, so that every process of a distributed run has one for every weight.
    """
    if not visuals and torch.is_grad_enabled():
        visuals = [_blank(spec)]
    visual = model.model.visual
    weight = visual.patch_embed.proj.weight
    zero = weight.new_zeros(len(visual.deepstack_visual_indexes) + 1, 1, model.config.text_config.hidden_size)
    if not visuals:
        return zero[0], zero[1:]
    groups = sorted(by_shape(visuals), key=lambda indices: visuals[indices[0]].tokens)
    inputs = []
    for indices in groups:
        alike = [visuals[index] for index in indices]
        arrays = pixel_segments(alike, spec), *vision_tables(*alike[0].grid, spec).inputs().values()
        inputs.append([_on(weight, array) for array in arrays])
    tokens_VD, deepstack_LVD = packed_vision_forward(visual, spec, inputs)
    order = [index for indices in groups for index in indices]
    owners_V = np.repeat(order, [visuals[index].tokens for index in order])
    back_V = _on(weight, np.argsort(owners_V, kind="stable"))  # into the order of `visuals`
    levels_LVD = torch.cat([zero, torch.cat((tokens_VD[None], deepstack_LVD))[:, back_V]], dim=1)
    return levels_LVD[0], levels_LVD[1:]


def _blank(spec: VisionSpec) -> Visual:
    pixels_THWC = np.zeros((1, spec.factor, spec.factor, 3), np.uint8)
    return Visual(pixels_THWC, grid=(spec.merge_size, spec.merge_size), tokens=1)


def _on(weight: Tensor, array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(weight.device)
