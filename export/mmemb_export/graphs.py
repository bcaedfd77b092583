"""The four parts of a checkpoint with inputs to trace them with, and the axes that vary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmemb_deploy import abi
from mmemb_deploy.preprocess import vision_tables
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.parts import Part, parts

Axes = dict[str, dict[int, str]]  # input -> axis -> name of the dimension that varies


@dataclass(frozen=True)
class Graph:
    """A part, example inputs for it by name, and the axes that vary."""

    name: str
    part: Part
    examples: dict[str, Tensor]
    axes: Axes


def graphs(checkpoint: Checkpoint) -> list[Graph]:
    """Return the four graphs of a checkpoint, in the order of `abi.GRAPHS`."""
    found = parts(checkpoint.model, checkpoint.rows.prompt.ids)
    text = checkpoint.model.config.text_config
    levels = len(checkpoint.model.model.visual.deepstack_visual_indexes)
    rows, tokens, shown, cached, new = 2, 7, 3, 5, 3  # sizes to trace with; all vary
    prefill = {
        abi.TOKEN_IDS: torch.ones(rows, tokens, dtype=torch.long),
        abi.POSITION_IDS: torch.arange(tokens).expand(3, rows, -1).contiguous(),
        abi.MASK: torch.ones(rows, tokens, dtype=torch.long),
        abi.VISUAL_INDEX: torch.zeros(rows, tokens, dtype=torch.long),
        abi.VISUAL_TOKENS: torch.zeros(shown, text.hidden_size),
    }
    prefill_axes: Axes = {
        abi.TOKEN_IDS: {0: "batch", 1: "tokens"},
        abi.POSITION_IDS: {1: "batch", 2: "tokens"},
        abi.MASK: {0: "batch", 1: "tokens"},
        abi.VISUAL_INDEX: {0: "batch", 1: "tokens"},
        abi.VISUAL_TOKENS: {0: "visual_tokens"},
    }
    if levels:
        prefill[abi.DEEPSTACK] = torch.zeros(levels, shown, text.hidden_size)
        prefill_axes[abi.DEEPSTACK] = {1: "visual_tokens"}
    past = list(abi.past_names(text.num_hidden_layers))
    cache_shape = rows, text.num_key_value_heads, cached, text.head_dim
    decode = {
        abi.TOKEN_IDS: torch.ones(rows, new, dtype=torch.long),
        abi.POSITION_IDS: torch.arange(cached, cached + new).expand(3, rows, -1).contiguous(),
        abi.MASK: torch.ones(rows, cached + new, dtype=torch.long),
        **{name: torch.zeros(cache_shape) for name in past},  # one shared tensor would be traced as one input
    }
    decode_axes: Axes = {
        abi.TOKEN_IDS: {0: "batch", 1: "new_tokens"},
        abi.POSITION_IDS: {1: "batch", 2: "new_tokens"},
        abi.MASK: {0: "batch", 1: "all_tokens"},
        **{name: {0: "batch", 2: "past_tokens"} for name in past},
    }
    gate = {abi.STATE: torch.zeros(rows, text.hidden_size)}
    return [
        Graph(abi.VISION, found[abi.VISION], *_vision_inputs(checkpoint)),
        Graph(abi.EMBEDDER, found[abi.EMBEDDER], prefill, prefill_axes),
        Graph(abi.GATE, found[abi.GATE], gate, {abi.STATE: {0: "batch"}}),
        Graph(abi.GENERATOR, found[abi.GENERATOR], decode, decode_axes),
    ]


def _vision_inputs(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Axes]:
    spec = checkpoint.vision
    tables = vision_tables(4 * spec.merge_size, 2 * spec.merge_size, spec)
    values = 3 * spec.temporal_patch_size * spec.patch_size**2
    per_patch = {
        abi.INTERPOLATION_INDEX: torch.from_numpy(tables.interpolation_index_P4),
        abi.INTERPOLATION_WEIGHT: torch.from_numpy(tables.interpolation_weight_P4),
        abi.ROTARY_COS: torch.from_numpy(tables.rotary_cos_PD),
        abi.ROTARY_SIN: torch.from_numpy(tables.rotary_sin_PD),
    }
    examples = {abi.PATCHES: torch.zeros(3, len(tables.rotary_cos_PD), values), **per_patch}
    return examples, {abi.PATCHES: {0: "images", 1: "patches"}, **{name: {0: "patches"} for name in per_patch}}
