"""The four graphs as torch modules, with the tensor names of `mmemb_deploy.abi` and inputs to trace them with.

Both decoder graphs hold the same language model under the same names, so that they can share one weight file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmemb_deploy import abi, prompts
from mmemb_deploy.preprocess import vision_tables
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.model import decoder_forward, vision_forward

Axes = dict[str, dict[int, str]]  # input -> axis -> name of the dimension that varies


@dataclass(frozen=True)
class Graph:
    """A module, example inputs for it, the axes that vary, and the names of its outputs."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    axes: Axes
    outputs: tuple[str, ...]
    listed: int = 0  # how many of the last inputs the module takes as one list


class _Vision(nn.Module):
    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def forward(
        self, patches: Tensor, index: Tensor, weight: Tensor, rotary_cos: Tensor, rotary_sin: Tensor
    ) -> tuple[Tensor, ...]:
        tokens_NMD, deepstack_LNMD = vision_forward(self.visual, patches, index, weight, rotary_cos, rotary_sin)
        return (tokens_NMD, deepstack_LNMD) if len(self.visual.deepstack_visual_indexes) else (tokens_NMD,)


class _Embedder(nn.Module):
    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self, token_ids: Tensor, position_ids: Tensor, mask: Tensor, visual_index: Tensor, visual_tokens: Tensor,
        deepstack: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        hidden_BSD, cache = decoder_forward(
            self.language_model, token_ids, position_ids, mask,
            visual_tokens_VD=visual_tokens, visual_index_BS=visual_index, deepstack_LVD=deepstack,
        )  # fmt: skip
        state_BD = _last(hidden_BSD, mask)
        return F.normalize(state_BD, dim=-1), state_BD, *(tensor for layer in cache for tensor in layer)


class _Generator(nn.Module):
    def __init__(self, language_model: Any, lm_head: nn.Linear) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head

    def forward(self, token_ids: Tensor, position_ids: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        layers = list(zip(past[::2], past[1::2], strict=True))
        hidden_BTD, cache = decoder_forward(self.language_model, token_ids, position_ids, mask, past=layers)
        state_BD = _last(hidden_BTD, mask[:, past[0].shape[2] :])
        return self.lm_head(state_BD), F.normalize(state_BD, dim=-1), *(tensor for layer in cache for tensor in layer)


class _Gate(nn.Module):
    """The model's own choice between two tokens: sigmoid(state @ (w_think - w_stop)), exactly sliced."""

    def __init__(self, lm_head: nn.Linear, think: int, stop: int) -> None:
        super().__init__()
        self.rows_2D = nn.Parameter(lm_head.weight[[think, stop]].detach().clone())

    def forward(self, state: Tensor) -> Tensor:
        think_B, stop_B = (state @ self.rows_2D.T).unbind(-1)
        return torch.sigmoid(think_B - stop_B)


def _last(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return each row's state at its last unmasked token, (B, D)."""
    last_B11 = (mask_BS.sum(dim=1) - 1)[:, None, None]
    return hidden_BSD.gather(1, last_B11.expand(-1, -1, hidden_BSD.shape[-1])).squeeze(1)


def graphs(checkpoint: Checkpoint) -> list[Graph]:
    """Return the four graphs of a checkpoint, in the order of `abi.GRAPHS`."""
    model, ids = checkpoint.model, checkpoint.rows.prompt.ids
    text = model.config.text_config
    language_model = model.model.language_model
    levels = len(model.model.visual.deepstack_visual_indexes)
    cache_names = list(abi.past_names(text.num_hidden_layers))
    present = tuple(abi.present_names(text.num_hidden_layers))
    rows, tokens, shown, cached, new = 2, 7, 3, 5, 3  # sizes to trace with; all vary
    embedder_inputs = {
        abi.TOKEN_IDS: torch.ones(rows, tokens, dtype=torch.long),
        abi.POSITION_IDS: torch.arange(tokens).expand(3, rows, -1).contiguous(),
        abi.MASK: torch.ones(rows, tokens, dtype=torch.long),
        abi.VISUAL_INDEX: torch.zeros(rows, tokens, dtype=torch.long),
        abi.VISUAL_TOKENS: torch.zeros(shown, text.hidden_size),
    }
    embedder_axes: Axes = {
        abi.TOKEN_IDS: {0: "batch", 1: "tokens"},
        abi.POSITION_IDS: {1: "batch", 2: "tokens"},
        abi.MASK: {0: "batch", 1: "tokens"},
        abi.VISUAL_INDEX: {0: "batch", 1: "tokens"},
        abi.VISUAL_TOKENS: {0: "visual_tokens"},
    }
    if levels:
        embedder_inputs[abi.DEEPSTACK] = torch.zeros(levels, shown, text.hidden_size)
        embedder_axes[abi.DEEPSTACK] = {1: "visual_tokens"}
    cache_shape = rows, text.num_key_value_heads, cached, text.head_dim
    return [
        _vision_graph(checkpoint),
        Graph(
            abi.EMBEDDER,
            _Embedder(language_model),
            embedder_inputs,
            embedder_axes,
            (abi.EMBEDDING, abi.STATE, *present),
        ),
        Graph(
            abi.GATE,
            _Gate(model.lm_head, ids[prompts.THINK], ids[prompts.STOP]),
            {abi.STATE: torch.zeros(rows, text.hidden_size)},
            {abi.STATE: {0: "batch"}},
            (abi.SCORE,),
        ),
        Graph(
            abi.GENERATOR,
            _Generator(language_model, model.lm_head),
            {
                abi.TOKEN_IDS: torch.ones(rows, new, dtype=torch.long),
                abi.POSITION_IDS: torch.arange(cached, cached + new).expand(3, rows, -1).contiguous(),
                abi.MASK: torch.ones(rows, cached + new, dtype=torch.long),
                **{
                    name: torch.zeros(cache_shape) for name in cache_names
                },  # one shared tensor would be traced as one input
            },
            {
                abi.TOKEN_IDS: {0: "batch", 1: "new_tokens"},
                abi.POSITION_IDS: {1: "batch", 2: "new_tokens"},
                abi.MASK: {0: "batch", 1: "all_tokens"},
                **{name: {0: "batch", 2: "past_tokens"} for name in cache_names},
            },
            (abi.LOGITS, abi.EMBEDDING, *present),
            listed=len(cache_names),
        ),
    ]


def _vision_graph(checkpoint: Checkpoint) -> Graph:
    spec, visual = checkpoint.vision, checkpoint.model.model.visual
    tables = vision_tables(4 * spec.merge_size, 2 * spec.merge_size, spec)
    values = 3 * spec.temporal_patch_size * spec.patch_size**2
    per_patch = {
        abi.INTERPOLATION_INDEX: torch.from_numpy(tables.interpolation_index_P4),
        abi.INTERPOLATION_WEIGHT: torch.from_numpy(tables.interpolation_weight_P4),
        abi.ROTARY_COS: torch.from_numpy(tables.rotary_cos_PD),
        abi.ROTARY_SIN: torch.from_numpy(tables.rotary_sin_PD),
    }
    patches = len(tables.rotary_cos_PD)
    return Graph(
        abi.VISION,
        _Vision(visual),
        {abi.PATCHES: torch.zeros(3, patches, values), **per_patch},
        {abi.PATCHES: {0: "images", 1: "patches"}, **{name: {0: "patches"} for name in per_patch}},
        (abi.VISUAL_TOKENS, abi.DEEPSTACK) if len(visual.deepstack_visual_indexes) else (abi.VISUAL_TOKENS,),
    )
