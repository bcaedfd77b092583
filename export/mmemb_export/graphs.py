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

Inputs = dict[str, tuple[Tensor, dict[int, str]]]  # by name: an example, and the names of the axes that vary

DECODER = "decoder"  # embedder and generator in one
ROWS, SHOWN, CACHED, NEW, IMAGES, FRAMES = 2, 3, 5, 3, 3, 2  # sizes to trace with; all vary


@dataclass(frozen=True)
class Traceable:
    """A part, what to trace it with, and the mode in which its fake weights can run."""

    name: str
    part: Part
    inputs: Inputs
    mode: FakeTensorMode


def traceables(outline: Checkpoint) -> list[Traceable]:
    """Return vision, the decoder in one, and the gate of a checkpoint that reasons."""
    model = outline.model
    found = parts(model, outline.vision, outline.rows.prompt.ids)
    mode: FakeTensorMode = model.fake_mode
    with mode:
        head = model.lm_head if outline.facts.prompt.reasons else None
        decoder = Decoder(model.model.language_model, head, levels=len(model.model.visual.deepstack_visual_indexes))
        state = torch.zeros(ROWS, model.config.text_config.hidden_size)
        given: list[tuple[str, Part, Inputs]] = [
            (abi.VISION, found[abi.VISION], _image_inputs(outline)),
            (DECODER, decoder, _token_inputs() | _visual_inputs(model.config, NEW) | _past_inputs(model)),
        ]
        if outline.facts.prompt.reasons:
            given.append((abi.GATE, found[abi.GATE], {abi.STATE: (state, {0: "batch"})}))
    return [Traceable(name, part, inputs, mode) for name, part, inputs in given]


def _token_inputs() -> Inputs:
    positions = torch.arange(CACHED, CACHED + NEW).expand(3, ROWS, -1).contiguous()
    return {
        abi.TOKEN_IDS: (torch.ones(ROWS, NEW, dtype=torch.long), {0: "batch", 1: "tokens"}),
        abi.POSITION_IDS: (positions, {1: "batch", 2: "tokens"}),
        abi.MASK: (torch.ones(ROWS, CACHED + NEW, dtype=torch.long), {0: "batch", 1: "all_tokens"}),
        abi.START: (torch.full((ROWS,), CACHED), {0: "batch"}),
        abi.LAST: (torch.zeros(ROWS, dtype=torch.long), {0: "batch"}),
    }


def _visual_inputs(config: Any, tokens: int) -> Inputs:
    hidden, levels = config.text_config.hidden_size, len(config.vision_config.deepstack_visual_indexes)
    inputs: Inputs = {
        abi.VISUAL_INDEX: (torch.zeros(ROWS, tokens, dtype=torch.long), {0: "batch", 1: "tokens"}),
        abi.VISUAL_TOKENS: (torch.zeros(SHOWN, hidden), {0: "visual_tokens"}),
    }
    if levels:
        inputs[abi.DEEPSTACK] = torch.zeros(levels, SHOWN, hidden), {1: "visual_tokens"}
    return inputs


def _past_inputs(model: Any) -> Inputs:
    text = model.config.text_config
    shape = ROWS, text.num_key_value_heads, CACHED, text.head_dim
    # one tensor each: a shared one would be traced as one input
    return {
        name: (torch.zeros(shape, dtype=model.dtype), {0: "batch", 2: "past_tokens"})
        for name in abi.past_names(text.num_hidden_layers)
    }


def _image_inputs(outline: Checkpoint) -> Inputs:
    spec = outline.vision
    tables = vision_tables(4 * spec.merge_size, 2 * spec.merge_size, spec).inputs()
    shape = IMAGES, FRAMES, len(tables[abi.SEGMENT_INDEX]), spec.patch_size, 3 * spec.patch_size
    inputs: Inputs = {abi.PIXELS: (torch.zeros(shape, dtype=torch.uint8), {0: "images", 1: "frames", 2: "patches"})}
    for name, table in tables.items():
        inputs[name] = torch.zeros(table.shape, dtype=getattr(torch, table.dtype.name)), {0: "patches"}
    return inputs
