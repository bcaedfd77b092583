"""Floating-point operations of a forward pass, from a shape and a load; tests hold them against torch's own counter.

A product of an (m, k) and a (k, n) matrix is 2 m k n operations. Norms, activations and softmax are left out: they are
bound by memory. Attention counts every pair of tokens, causal or not: a mask is passed, and no kernel skips by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_training.plan.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Load:
    """One prompt, and the rationales that follow it from its KV cache."""

    tokens: int  # of the prompt, visual ones included
    frames: int = 0  # images, or pairs of video frames: each is encoded by itself
    patches: int = 0  # of a frame
    paths: int = 0  # rationales
    words: int = 0  # tokens of a rationale

    @property
    def path_tokens(self) -> int:
        """Tokens of a rationale and its markers."""
        return self.words + PATH_MARKERS

    @property
    def context(self) -> int:
        """Tokens that the end of a rationale sees."""
        return self.tokens + self.path_tokens


def patches_of(shape: ModelShape, pixels: int) -> int:
    """Return the patches of a frame of at most so many pixels, a whole number of visual tokens, at least one."""
    unit = shape.vision.merge**2
    return max(1, pixels // (shape.vision.patch**2 * unit)) * unit


def visual_tokens(shape: ModelShape, patches: int) -> int:
    """Return the tokens that the patches of a frame become."""
    return patches // shape.vision.merge**2


def forward_flops(shape: ModelShape, load: Load) -> int:
    """Return the operations of one reading: vision, prompt, decision, rationales and the logits of their words."""
    return vision_flops(shape, load) + text_flops(shape, load)


def vision_flops(shape: ModelShape, load: Load) -> int:
    """Return the operations of the vision tower and its mergers; a patch attends within its frame."""
    vision = shape.vision
    matrices = vision.patch_matrix() + vision.layers * vision.layer_matrices()
    mergers = (1 + len(vision.deepstack)) * vision.merger_matrices()
    attention = 4 * load.patches**2 * vision.hidden * vision.layers
    linear = 2 * matrices * load.patches + 2 * mergers * visual_tokens(shape, load.patches)
    return load.frames * (linear + attention)


def text_flops(shape: ModelShape, load: Load) -> int:
    """Return the operations of the language model on a prompt and its rationales, with the logits that are read."""
    head = 2 * shape.text.embedding_parameters()
    prompt = layer_flops(shape, load.tokens, load.tokens) + head
    path = layer_flops(shape, load.path_tokens, load.context) + head * (load.words + 1)
    return prompt + load.paths * path


def layer_flops(shape: ModelShape, tokens: int, context: int) -> int:
    """Return the operations of all text layers on new tokens that attend to a context, themselves included."""
    text = shape.text
    attention = 4 * tokens * context * text.heads * text.head_dim
    return text.layers * (2 * text.layer_matrices() * tokens + attention)


def generated_flops(shape: ModelShape, load: Load) -> float:
    """Return the mean operations of one generated token: layers and head, at half of the rationale."""
    return layer_flops(shape, 1, load.tokens + load.words // 2) + 2 * shape.text.embedding_parameters()


def generated_bytes(shape: ModelShape, load: Load, together: int) -> float:
    """Return the bytes that one decoding step of `together` sequences reads: the bf16 weights, and every KV cache."""
    text = shape.text
    weights = text.layers * text.layer_parameters() + text.embedding_parameters()
    cache = together * (load.tokens + load.words // 2) * kv_values(shape)
    return 2.0 * (weights + cache)


def kv_values(shape: ModelShape) -> int:
    """Return the values that all layers cache of one token."""
    return 2 * shape.text.layers * shape.text.kv_heads * shape.text.head_dim
