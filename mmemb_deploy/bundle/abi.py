"""Names of the tensors that go in and out of a bundle's graphs: the contract between export, engines and the runtime.

A reasoning model's decoder is one graph, `embedder` for prompts and `generator` for what follows them (one file where
their precisions are equal). Its KV cache lies in slots, R for each row, and is written in place: every `present` has
the shape and the address of its `past`. New tokens follow the `start` tokens that a row has there, and see those, the
new ones before them, and themselves; padding lies behind a row's last token, so that nothing of the row sees it.
`direct` is the same decoder without a cache, for prompts that nothing follows.

In the portable form the decoder is standard ONNX, of TensorScatter and Attention at opset 24; in the fused form, of
ONNX Runtime's GroupQueryAttention. The tensors are the same.

Axes: N images of one shape, F frames of an image, P patches, r rows of a patch, c bytes of such a row, M visual tokens
of an image, L DeepStack levels, D hidden size, V visual tokens of a batch and a first row of zeros, B rows, T new
tokens, R slots of a row, H key-value heads, E head size, W words of the vocabulary. Pixels are uint8, floats but for
keys and values float32, ids and counts int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

VISION: Final = "vision"
DIRECT: Final = "direct"
EMBEDDER: Final = "embedder"
GATE: Final = "gate"
GENERATOR: Final = "generator"
GRAPHS: Final = (VISION, DIRECT, EMBEDDER, GATE, GENERATOR)

# vision, in: pixels as `mmemb_deploy.inputs.preprocess.pixel_segments` and tables as its `vision_tables` give them
PIXELS: Final = "pixels"  # (N, F, P, r, c), uint8; F is 1 or the frames of a temporal patch
SEGMENT_INDEX: Final = "segment_index"  # (P, r): which segment, of an image's P * r, each row of a patch is
INTERPOLATION_INDEX: Final = "interpolation_index"  # (P, 4)
INTERPOLATION_WEIGHT: Final = "interpolation_weight"  # (P, 4)
ROTARY_COS: Final = "rotary_cos"  # (P, E of the vision tower)
ROTARY_SIN: Final = "rotary_sin"
# vision, out; decoder, in
VISUAL_TOKENS: Final = "visual_tokens"  # out (N, M, D), in (V, D)
DEEPSTACK: Final = "deepstack"  # out (L, N, M, D), in (L, V, D); absent where the model has no level

# decoder, in
TOKEN_IDS: Final = "token_ids"  # (B, T)
POSITION_IDS: Final = "position_ids"  # (3, B, T): time, height, width
LAST: Final = "last"  # (B,): place of a row's last token among the new ones; -1 for a row that has none
START: Final = "start"  # (B,): tokens of a row in the cache before the new ones, whose slots follow
VISUAL_INDEX: Final = "visual_index"  # (B, T): row of VISUAL_TOKENS that a token shows, 0 for a word
WINDOW: Final = "window"  # (S,): 0 to S - 1, the slots that attention looks at; in TensorRT's engines alone

# decoder, out; all of a row's last token
EMBEDDING: Final = "embedding"  # (B, D), L2-normalised
STATE: Final = "state"  # (B, D), after the final norm; the gate's input
LOGITS: Final = "logits"  # (B, W)
# in the portable form, what the next step of one token reads, so that it need not come from the host
NEXT_TOKEN: Final = "next_token"  # (B, 1): the likeliest
NEXT_POSITION: Final = "next_position"  # (3, B, 1)
NEXT_START: Final = "next_start"  # (B,)
FED_BACK: Final = {NEXT_TOKEN: TOKEN_IDS, NEXT_POSITION: POSITION_IDS, NEXT_START: START}

# in place of LAST, START and the cache, in torch's modules, which see a whole cache (`mmemb_training.parts`)
MASK: Final = "mask"  # (B, K): 1 where a token of the cache or a new one may be attended to

SCORE: Final = "score"  # (B,): probability of `<think>` against stop


def past_names(layers: int) -> Iterator[str]:
    """Yield the decoder's cache inputs, keys before values, (B, H, R, E) each."""
    return _cache_names("past", layers)


def present_names(layers: int) -> Iterator[str]:
    """Yield the decoder's cache outputs, in the order of `past_names` and at their addresses."""
    return _cache_names("present", layers)


def _cache_names(prefix: str, layers: int) -> Iterator[str]:
    for layer in range(layers):
        yield f"{prefix}.{layer}.key"
        yield f"{prefix}.{layer}.value"
