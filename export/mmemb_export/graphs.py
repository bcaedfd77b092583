"""The parts of a checkpoint with inputs to trace them with, and the axes that vary.

The checkpoint is an outline (`mmemb_training.checkpoint.outline_checkpoint`): it has shapes and types, no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmemb_deploy.bundle import abi
from mmemb_deploy.inputs.preprocess import vision_tables
from mmemb_export.decoder import Decoder
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.parts import Part, parts

Axes = dict[str, dict[int, str]]  # input -> axis -> name of the dimension that varies

DECODER = "decoder"  # embedder and generator in one
ROWS, TOKENS, SHOWN, CACHED, NEW = 2, 7, 3, 5, 3  # sizes to trace with; all vary


@dataclass(frozen=True)
class Graph:
    """A part, example inputs for it by name, the axes that vary, and the mode in which its fake weights can run."""

    name: str
    part: Part
    examples: dict[str, Tensor]
    axes: Axes
    mode: FakeTensorMode


def portable_graphs(outline: Checkpoint) -> list[Graph]:
    """Return the graphs of a checkpoint in standard ONNX, in the order of `abi.GRAPHS`."""
    found = parts(outline.model, outline.rows.prompt.ids)
    mode: FakeTensorMode = outline.model.fake_mode
    with mode:
        config, dtype = outline.model.config, outline.model.dtype
        gate = {abi.STATE: torch.zeros(ROWS, config.text_config.hidden_size)}
        inputs: dict[str, tuple[dict[str, Tensor], Axes]] = {
            abi.VISION: _image_inputs(outline),
            abi.EMBEDDER: embedder_inputs(config),
            abi.GATE: (gate, {abi.STATE: {0: "batch"}}),
            abi.GENERATOR: generator_inputs(config, dtype),
        }
    return [Graph(name, part, *inputs[name], mode) for name, part in found.items()]


def embedder_inputs(config: Any) -> tuple[dict[str, Tensor], Axes]:
    """Return example inputs of `abi.EMBEDDER` for a `Qwen3VLConfig`, and the axes that vary."""
    tokens, token_axes = _token_inputs(TOKENS, 0, "tokens", "tokens")
    shown, shown_axes = _visual_inputs(config, TOKENS, "tokens")
    return tokens | shown, token_axes | shown_axes


def generator_inputs(config: Any, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Axes]:
    """Return example inputs of `abi.GENERATOR` over a cache of `dtype`, and the axes that vary."""
    tokens, token_axes = _token_inputs(NEW, CACHED, "new_tokens", "all_tokens")
    past, past_axes = _past_inputs(config, dtype)
    return tokens | past, token_axes | past_axes


def fused_graphs(outline: Checkpoint) -> list[Graph]:
    """Return vision, gate, and embedder and generator as one DECODER, to be fused (`mmemb_export.fuse`)."""
    others = [graph for graph in portable_graphs(outline) if graph.name in (abi.VISION, abi.GATE)]
    model = outline.model
    levels = len(model.model.visual.deepstack_visual_indexes)
    mode: FakeTensorMode = model.fake_mode
    with mode:
        head = model.lm_head if outline.facts.prompt.reasons else None
        part = Decoder(model.model.language_model, head, levels=levels)
        tokens, token_axes = _token_inputs(NEW, CACHED, "tokens", "all_tokens")
        shown, shown_axes = _visual_inputs(model.config, NEW, "tokens")
        past, past_axes = _past_inputs(model.config, model.dtype)
        last = {abi.LAST: torch.zeros(ROWS, dtype=torch.long)}
    axes = token_axes | shown_axes | past_axes | {abi.LAST: {0: "batch"}}
    return [*others, Graph(DECODER, part, tokens | shown | past | last, axes, mode)]


def _token_inputs(new: int, cached: int, axis: str, mask_axis: str) -> tuple[dict[str, Tensor], Axes]:
    return {
        abi.TOKEN_IDS: torch.ones(ROWS, new, dtype=torch.long),
        abi.POSITION_IDS: torch.arange(cached, cached + new).expand(3, ROWS, -1).contiguous(),
        abi.MASK: torch.ones(ROWS, cached + new, dtype=torch.long),
    }, {
        abi.TOKEN_IDS: {0: "batch", 1: axis},
        abi.POSITION_IDS: {1: "batch", 2: axis},
        abi.MASK: {0: "batch", 1: mask_axis},
    }


def _visual_inputs(config: Any, tokens: int, axis: str) -> tuple[dict[str, Tensor], Axes]:
    hidden = config.text_config.hidden_size
    examples = {
        abi.VISUAL_INDEX: torch.zeros(ROWS, tokens, dtype=torch.long),
        abi.VISUAL_TOKENS: torch.zeros(SHOWN, hidden),
    }
    axes: Axes = {abi.VISUAL_INDEX: {0: "batch", 1: axis}, abi.VISUAL_TOKENS: {0: "visual_tokens"}}
    levels = len(config.vision_config.deepstack_visual_indexes)
    if levels:
        examples[abi.DEEPSTACK] = torch.zeros(levels, SHOWN, hidden)
        axes[abi.DEEPSTACK] = {1: "visual_tokens"}
    return examples, axes


def _past_inputs(config: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], Axes]:
    text = config.text_config
    names = list(abi.past_names(text.num_hidden_layers))
    shape = ROWS, text.num_key_value_heads, CACHED, text.head_dim
    # one tensor each: a shared one would be traced as one input
    return {name: torch.zeros(shape, dtype=dtype) for name in names}, {
        name: {0: "batch", 2: "past_tokens"} for name in names
    }


def _image_inputs(outline: Checkpoint) -> tuple[dict[str, Tensor], Axes]:
    spec = outline.vision
    tables = vision_tables(4 * spec.merge_size, 2 * spec.merge_size, spec)
    values = 3 * spec.temporal_patch_size * spec.patch_size**2
    patches = len(tables.rotary_cos_PD)
    per_patch = {
        abi.INTERPOLATION_INDEX: torch.zeros(tables.interpolation_index_P4.shape, dtype=torch.long),
        abi.INTERPOLATION_WEIGHT: torch.zeros(tables.interpolation_weight_P4.shape),
        abi.ROTARY_COS: torch.zeros(tables.rotary_cos_PD.shape),
        abi.ROTARY_SIN: torch.zeros(tables.rotary_sin_PD.shape),
    }
    examples = {abi.PATCHES: torch.zeros(3, patches, values), **per_patch}
    return examples, {abi.PATCHES: {0: "images", 1: "patches"}, **{name: {0: "patches"} for name in per_patch}}
