"""Names of the tensors that go in and out of the four graphs: the contract between export, engines and the runtime.

Decoder graphs come in two forms. Portable ones are standard ONNX: a cache in, a longer cache out. A fused one is ONNX
Runtime's own: it is embedder and generator in one, with the inputs and outputs of both, and writes the cache in place.

Axes: N images of one grid, P patches, F values of a patch, M visual tokens of an image, L DeepStack levels, D hidden
size, V visual tokens of a batch and a first row of zeros, B rows, S tokens of a prompt, T new tokens, K cached and new
tokens, H key-value heads, E head size, W words of the vocabulary. Floats are float32, ids and masks int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

VISION: Final = "vision"
EMBEDDER: Final = "embedder"
GATE: Final = "gate"
GENERATOR: Final = "generator"
FAST_GRAPHS: Final = (VISION, EMBEDDER)  # all that a model without reasoning has
GRAPHS: Final = (*FAST_GRAPHS, GATE, GENERATOR)

# vision, in; the tables come from `mmemb_deploy.inputs.preprocess.vision_tables`
PATCHES: Final = "patches"  # (N, P, F)
INTERPOLATION_INDEX: Final = "interpolation_index"  # (P, 4)
INTERPOLATION_WEIGHT: Final = "interpolation_weight"  # (P, 4)
ROTARY_COS: Final = "rotary_cos"  # (P, E of the vision tower)
ROTARY_SIN: Final = "rotary_sin"
# vision, out; embedder, in
VISUAL_TOKENS: Final = "visual_tokens"  # out (N, M, D), in (V, D)
DEEPSTACK: Final = "deepstack"  # out (L, N, M, D), in (L, V, D); absent where the model has no level

# embedder and generator, in
TOKEN_IDS: Final = "token_ids"  # (B, S) or (B, T)
POSITION_IDS: Final = "position_ids"  # (3, B, S) or (3, B, T): time, height, width
MASK: Final = "mask"  # (B, S) or (B, K): 1 where a token may be attended to; rows are padded on the right
VISUAL_INDEX: Final = "visual_index"  # (B, S): row of VISUAL_TOKENS that a token shows, 0 for a word

# in place of MASK in fused graphs, whose cache is a buffer with room that each row fills from its start
LENGTHS: Final = "lengths"  # (B,): tokens of a row in the cache after the new ones
LAST: Final = "last"  # (B,): place of a row's last token among the new ones

# embedder and generator, out; all of a row's last unmasked token
EMBEDDING: Final = "embedding"  # (B, D), L2-normalised
STATE: Final = "state"  # (B, D), after the final norm; the gate's input
LOGITS: Final = "logits"  # (B, W)

SCORE: Final = "score"  # (B,): probability of `<think>` against stop


def past_names(layers: int) -> Iterator[str]:
    """Yield the generator's cache inputs, keys before values, (B, H, K - T, E) each."""
    return _cache_names("past", layers)


def present_names(layers: int) -> Iterator[str]:
    """Yield the cache outputs of embedder and generator, in the order of `past_names`, (B, H, K, E) each."""
    return _cache_names("present", layers)


def _cache_names(prefix: str, layers: int) -> Iterator[str]:
    for layer in range(layers):
        yield f"{prefix}.{layer}.key"
        yield f"{prefix}.{layer}.value"
