"""The forward pass of a Qwen3-VL, over images that share a grid and prompts whose visual tokens are indexed.

The modules and weights are transformers' own; what differs is the plumbing between them, chosen so that training runs
without a Python loop over images and export sees no data-dependent shape:

- vision: images are cut into patches here and not by a processor. Those of one shape are a batch, which is what export
  sees; of several shapes they are packed, as transformers packs them, but attend together where they are of one length
  and not one by one;
- text: `visual_index` says for every token which row of `visual_tokens` it shows, 0 for a word (row 0 is all zeros),
  where transformers scatters by boolean masks;
- cache: plain tensors in, plain tensors out.

Gradient checkpointing is switched on by `checkpoint_layers`.

Axes: N images of one shape, T frames of an image, P patches, r rows of a patch, c values of such a row, G segments of
an image (P x r), F values of a patch, M visual tokens of an image, V visual tokens of a batch and
the zero row, L DeepStack levels, B prompts, S new tokens, K cached and new tokens, D hidden size, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmemb_deploy.inputs.preprocess import VisionSpec

KeyValue = tuple[Tensor, Tensor]  # keys and values of one layer, (B, H, K, E) each


def patches(pixels_NTPrc: Tensor, segment_index_Pr: Tensor, spec: VisionSpec) -> Tensor:
    """Return the normalised patches of images that share a shape, (N, P, F) float32, in the order of the merge blocks.

    A patch's values lie as in memory, by frame, row, column and channel; one frame stands for all of a temporal patch.
    They are equal to the last bit to those of `Qwen2VLImageProcessorPil`, which orders them by channel first.
    """
    segments_NTGc = pixels_NTPrc.float().flatten(2, 3).index_select(2, segment_index_Pr.flatten())
    mean_c, std_c = (_along_a_row(values, spec, segments_NTGc) for values in (spec.image_mean, spec.image_std))
    rows_NTPrc = ((segments_NTGc / 255 - mean_c) / std_c).unflatten(2, (-1, spec.patch_size))
    frame_T = torch.arange(spec.temporal_patch_size, device=pixels_NTPrc.device).clamp(max=pixels_NTPrc.shape[1] - 1)
    patches_NPF: Tensor = rows_NTPrc.transpose(1, 2).index_select(2, frame_T).flatten(2)
    return patches_NPF


def _along_a_row(values_C: Sequence[float], spec: VisionSpec, like: Tensor) -> Tensor:
    """Repeat a value of each channel along the row of a patch, without a tensor that export cannot fake."""
    return torch.cat([like.new_full((1,), value) for value in values_C]).repeat(spec.patch_size)


def vision_forward(
    visual: Any,
    spec: VisionSpec,
    pixels_NTPrc: Tensor,
    segment_index_Pr: Tensor,
    interpolation_index_P4: Tensor,
    interpolation_weight_P4: Tensor,
    rotary_cos_PE: Tensor,
    rotary_sin_PE: Tensor,
) -> tuple[Tensor, Tensor]:
    """Encode images that share a shape with a `Qwen3VLVisionModel`; return tokens (N, M, D), DeepStack (L, N, M, D).

    The tables come from `mmemb_deploy.inputs.preprocess.vision_tables`. Follows `Qwen3VLVisionModel.forward`.
    """
    images = pixels_NTPrc.shape[0]
    hidden_NPD = _embed_patches(
        visual, spec, pixels_NTPrc, segment_index_Pr, interpolation_index_P4, interpolation_weight_P4
    )
    tokens_VD, deepstack_LVD = _vision_layers(visual, hidden_NPD, rotary_cos_PE, rotary_sin_PE)
    return tokens_VD.unflatten(0, (images, -1)), deepstack_LVD.unflatten(1, (images, -1))


def packed_vision_forward(visual: Any, spec: VisionSpec, groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Encode images of several shapes together; return tokens (V, D) and DeepStack (L, V, D), image after image.

    A group holds the inputs of `vision_forward` for the images of one shape; groups with as many patches an image are
    neighbours. All layers run once over the patches of all, but for attention: once for each count of patches.
    """
    hidden_PD = torch.cat([_embed_patches(visual, spec, *group[:4]).flatten(0, 1) for group in groups])
    cos_PE, sin_PE = (torch.cat([group[at].repeat(len(group[0]), 1) for group in groups]) for at in (4, 5))
    runs: list[list[int]] = []  # images that attend together, and the patches of each
    for group in groups:
        if runs and runs[-1][1] == len(group[1]):
            runs[-1][0] += len(group[0])
        else:
            runs.append([len(group[0]), len(group[1])])
    return _vision_layers(visual, hidden_PD[None], cos_PE, sin_PE, runs)


def _embed_patches(
    visual: Any,
    spec: VisionSpec,
    pixels_NTPrc: Tensor,
    segment_index_Pr: Tensor,
    interpolation_index_P4: Tensor,
    interpolation_weight_P4: Tensor,
) -> Tensor:
    projection = visual.patch_embed.proj
    patches_NPF = patches(pixels_NTPrc, segment_index_Pr, spec).to(projection.weight.dtype)
    weight_DF = projection.weight.permute(0, 2, 3, 4, 1).flatten(1)  # to move a weight once is faster than every pixel
    hidden_NPD = F.linear(patches_NPF, weight_DF, projection.bias)
    table_PD = (visual.pos_embed(interpolation_index_P4) * interpolation_weight_P4[:, :, None]).sum(1)
    placed_NPD: Tensor = hidden_NPD + table_PD.to(hidden_NPD.dtype)
    return placed_NPD


def _vision_layers(
    visual: Any, hidden_NPD: Tensor, cos_PE: Tensor, sin_PE: Tensor, runs: Sequence[Sequence[int]] = ()
) -> tuple[Tensor, Tensor]:
    """Return the merged tokens of patches, (V, D), and their DeepStack levels, (L, V, D)."""
    levels = []
    for depth, block in enumerate(visual.blocks):
        if block.gradient_checkpointing and torch.is_grad_enabled():
            hidden_NPD = checkpoint(_vision_block, block, hidden_NPD, cos_PE, sin_PE, runs, use_reentrant=False)
        else:
            hidden_NPD = _vision_block(block, hidden_NPD, cos_PE, sin_PE, runs)
        if depth in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[list(visual.deepstack_visual_indexes).index(depth)]
            levels.append(merger(hidden_NPD.flatten(0, 1)))
    tokens_VD = visual.merger(hidden_NPD.flatten(0, 1))
    return tokens_VD, torch.stack(levels) if levels else tokens_VD.new_zeros(0, *tokens_VD.shape)


def _vision_block(
    block: Any, hidden_NPD: Tensor, cos_PE: Tensor, sin_PE: Tensor, runs: Sequence[Sequence[int]] = ()
) -> Tensor:
    hidden_NPD = hidden_NPD + _vision_attention(block.attn, block.norm1(hidden_NPD), cos_PE, sin_PE, runs)
    mixed_NPD: Tensor = hidden_NPD + block.mlp(block.norm2(hidden_NPD))
    return mixed_NPD


def _vision_attention(
    attention: Any, hidden_NPD: Tensor, cos_PE: Tensor, sin_PE: Tensor, runs: Sequence[Sequence[int]]
) -> Tensor:
    """Attend within images: N of them, or those whose patches lie one after the other, in `runs` of a length."""
    queries, keys, values = (
        attention.qkv(hidden_NPD).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    queries, keys = _rotate(queries, cos_PE, sin_PE), _rotate(keys, cos_PE, sin_PE)
    if not runs:
        mixed_NPHE = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
    else:
        sizes = [images * length for images, length in runs]
        parts = zip(runs, *(states.split(sizes, dim=2) for states in (queries, keys, values)), strict=True)
        mixed = [
            F.scaled_dot_product_attention(*(part[0].unflatten(1, tuple(run)).transpose(0, 1) for part in states))
            for run, *states in parts
        ]
        mixed_NPHE = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in mixed])[None]
    out_NPD: Tensor = attention.proj(mixed_NPHE.flatten(2))
    return out_NPD


def _rotate(states_NHPE: Tensor, cos_PE: Tensor, sin_PE: Tensor) -> Tensor:
    left, right = states_NHPE.chunk(2, dim=-1)
    return (states_NHPE * cos_PE + torch.cat((-right, left), dim=-1) * sin_PE).to(states_NHPE.dtype)


def decoder_forward(
    language_model: Any,
    token_ids_BS: Tensor,
    position_ids_3BS: Tensor,
    mask_BK: Tensor | None,
    *,
    visual_tokens_VD: Tensor | None = None,
    visual_index_BS: Tensor | None = None,
    deepstack_LVD: Tensor | None = None,
    past: list[KeyValue] | None = None,
    owners_B: Tensor | None = None,
    last_B: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, list[KeyValue]]:
    """Run a `Qwen3VLTextModel`; return the states after the final norm (B, S, D) and every layer's cache.

    With `last_B`, the states are those of each row's token at that index alone, (B, D): what follows the last layer's
    attention runs on no other.

    `mask_BK` is 1 for tokens that may be attended to, over the cache and the new tokens; rows are padded on the right.
    Without a cache it may be None: a token then attends to those before it, none of which is padding, and the kernels
    that take no mask (FlashAttention) may be used. Row b continues row `owners_B[b]` of the cache, row b where that is
    None: each layer copies what it reads, when it reads it. Without `keep`, no cache is returned.
    Follows `Qwen3VLTextModel.forward` and `Qwen3VLModel.forward`.
    """
    assert mask_BK is not None or past is None
    hidden_BSD = language_model.embed_tokens(token_ids_BS)
    if visual_tokens_VD is not None and visual_index_BS is not None:
        hidden_BSD = torch.where(visual_index_BS[..., None] > 0, visual_tokens_VD[visual_index_BS], hidden_BSD)
    rotary = tuple(table.to(hidden_BSD.dtype) for table in _rotary_tables(language_model.rotary_emb, position_ids_3BS))
    allowed_B1SK = None if mask_BK is None else _allowed(mask_BK, token_ids_BS.shape[1])
    present: list[KeyValue] = []
    for depth, layer in enumerate(language_model.layers):
        cache = _LayerCache(None if past is None else past[depth], owners_B, keep=keep)
        reads = {"position_embeddings": rotary, "attention_mask": allowed_B1SK, "past_key_values": cache}
        if last_B is None or depth + 1 < len(language_model.layers):
            hidden_BSD = layer(hidden_BSD, **reads)
        else:
            hidden_BSD = _last_layer(layer, hidden_BSD, last_B, reads)
            if visual_index_BS is not None:
                visual_index_BS = visual_index_BS.gather(1, last_B[:, None])
        present += cache.grown
        if deepstack_LVD is not None and visual_index_BS is not None and depth < deepstack_LVD.shape[0]:
            hidden_BSD = hidden_BSD + deepstack_LVD[depth][visual_index_BS]
    normed_BSD: Tensor = language_model.norm(hidden_BSD)
    return normed_BSD if last_B is None else normed_BSD.squeeze(1), present


def _last_layer(layer: Any, hidden_BSD: Tensor, last_B: Tensor, reads: Mapping[str, Any]) -> Tensor:
    """Return what a layer makes of each row's last token, (B, 1, D). Follows `Qwen3VLTextDecoderLayer.forward`."""
    mixed_BSD, _ = layer.self_attn(layer.input_layernorm(hidden_BSD), **reads)
    hidden_B1D = _at(hidden_BSD + mixed_BSD, last_B)
    made_B1D: Tensor = hidden_B1D + layer.mlp(layer.post_attention_layernorm(hidden_B1D))
    return made_B1D


def _allowed(mask_BK: Tensor, new: int) -> Tensor:
    """Return which of the cached and the new tokens each of the `new` ones attends to, (B, 1, S, K)."""
    total = mask_BK.shape[1]
    reach_SK = torch.arange(total, device=mask_BK.device) <= torch.arange(new, device=mask_BK.device)[:, None] + (
        total - new
    )
    return reach_SK & (mask_BK[:, None, None, :] > 0)


def last_state(hidden_BSD: Tensor, last_B: Tensor) -> Tensor:
    """Return each row's state at the index of its last token, (B, D): what an embedding, a gate and a head read."""
    return _at(hidden_BSD, last_B).squeeze(1)


def _at(hidden_BSD: Tensor, last_B: Tensor) -> Tensor:
    last_B1D = last_B[:, None, None].expand(-1, -1, hidden_BSD.shape[-1])
    return hidden_BSD.gather(1, last_B1D)


def checkpoint_layers(model: Any) -> None:
    """Recompute every layer's activations in the backward pass of a training model instead of keeping them.

    The text layers checkpoint themselves, with our cache: its update has the same effect when it is replayed.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.language_model.layers:
        layer._can_checkpoint_with_cache = True


def _rotary_tables(rotary: Any, position_ids_3BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, S, E). Each frequency follows one axis: time, or in turn height and width.

    The interleaved layout of `Qwen3VLTextRotaryEmbedding.recomposition_frequencies`, as a lookup instead of a scatter.
    """
    frequency = torch.arange(len(rotary.inv_freq), device=position_ids_3BS.device)
    axis_of_frequency = torch.zeros_like(frequency)
    for axis in (1, 2):
        turns = (frequency % 3 == axis) & (frequency < rotary.mrope_section[axis] * 3)
        axis_of_frequency = axis_of_frequency + axis * turns
    angles = position_ids_3BS[axis_of_frequency].permute(1, 2, 0) * rotary.inv_freq
    angles_BSE = torch.cat((angles, angles), dim=-1)
    return angles_BSE.cos() * rotary.attention_scaling, angles_BSE.sin() * rotary.attention_scaling


class _LayerCache:
    """The part of transformers' cache interface that one layer's attention calls: append, and return the whole."""

    def __init__(self, past: KeyValue | None, owners_B: Tensor | None = None, *, keep: bool = True) -> None:
        self._past = past
        self._owners_B = owners_B
        self._keep = keep
        self.grown: list[KeyValue] = []  # the longer cache, once it is there, if it is kept

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeyValue:
        if self._past is not None:
            before = self._past
            if self._owners_B is not None:
                before = before[0].index_select(0, self._owners_B), before[1].index_select(0, self._owners_B)
            keys, values = torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2)
        if self._keep:
            self.grown = [(keys, values)]
        return keys, values
