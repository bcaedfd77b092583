"""Bytes that training holds on one GPU: weights and optimizer, activations, and the loss.

`layer_bytes` and `vision_layer_bytes` are exact in bf16 (in float32 some copies fall away): tests hold them against
what autograd saves. The peaks built on them follow `mmemb_training.encoder`, which reads a prompt, then its rationales
from the prompt's KV cache:

    logits      the end of the forward pass, where the logits are differentiated
    rationale   a rationale's layer is recomputed; the prompt's inputs and all caches are still held
    prompt      a prompt's layer is recomputed; rationales are gone, the gradients of the caches have come
    vision      a vision layer is recomputed

A test holds the largest of them against the peak of a real backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmemb_training.plan.arithmetic import Load, kv_values, visual_tokens
from mmemb_training.plan.shapes import ModelShape

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Training:
    """What of a model is trained, and in which precision."""

    method: Literal["full", "lora"]
    precision: Literal["bf16", "fp32"]
    gpus: int
    checkpointing: bool = True
    rank: int = 0
    targets: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Bytes of a value that is computed with."""
        return 2 if self.precision == "bf16" else 4

    @property
    def residual(self) -> int:
        """Bytes of a value between layers: autocast, which one GPU trains all weights with, keeps it in float32."""
        return 4 if self.method == "full" and self.gpus == 1 else self.width


@dataclass(frozen=True)
class Term:
    """One part of the memory of a GPU: its name, bytes, and how they were found."""

    name: str
    bytes: float
    basis: str


def state_terms(shape: ModelShape, training: Training, *, reference: bool = False) -> list[Term]:
    """Return what is held from step to step. `reference` adds the frozen snapshot of stage 4."""
    parameters, width, gpus = shape.parameters(), training.width, training.gpus
    if training.method == "lora":
        adapters = shape.lora_parameters(training.rank, training.targets)
        buckets = 4 * adapters if gpus > 1 else 0
        return [
            Term("frozen weights", width * parameters, f"{width} B x {parameters:,} parameters, on every GPU"),
            Term(
                "adapters and optimizer",
                16 * adapters + buckets,
                f"16 B x {adapters:,}: fp32 weights 4, gradients 4, AdamW moments 8"
                + ("; DDP's gradient buckets 4" if buckets else ""),
            ),
        ]
    shard = f"{parameters:,} parameters" + (f" / {gpus} GPUs (FSDP2)" if gpus > 1 else "")
    terms = [
        Term("weights", 4 * parameters / gpus, f"4 B (fp32 master) x {shard}"),
        Term("gradients", 4 * parameters / gpus, f"4 B (fp32) x {shard}"),
        Term("optimizer", 8 * parameters / gpus, f"8 B (AdamW's two moments, fp32) x {shard}"),
    ]
    layer, layers = shape.text.layer_parameters(), shape.text.layers
    if gpus > 1:
        root = parameters - layers * layer - shape.vision.layers * shape.vision.layer_parameters()
        terms.append(
            Term(
                "gathered weights",
                2 * width * (root + 2 * layer),
                f"{width} B x 2 (weights, gradients) x (all outside layers {root:,} + 2 layers of {layer:,}): FSDP2 "
                "gathers a layer while the one before it runs",
            )
        )
    elif width == 2:
        terms.append(Term("bf16 copies", 2 * parameters, f"2 B x {shard}: autocast keeps them for the step"))
    waiting = width * layers * layer
    terms.append(
        Term(
            "waiting gradients",
            waiting,
            f"{width} B x {layers} text layers of {layer:,}: those of the rationale wait for those of the prompt",
        )
    )
    if reference:
        terms.append(Term("reference", width * parameters / gpus, f"{width} B x {shard}: the frozen snapshot"))
    return terms


def optimizer_step_bytes(shape: ModelShape, training: Training) -> float:
    """Return the temporaries of AdamW's foreach step: one fp32 value per trained weight of this GPU (torch's docs)."""
    if training.method == "lora":
        return 4 * shape.lora_parameters(training.rank, training.targets)
    return 4 * shape.parameters() / training.gpus


def layer_bytes(shape: ModelShape, tokens: int, context: int, width: int) -> int:
    """Return what autograd saves of one text layer, for new tokens that attend to a context.

    Per token: two RMSNorms (a float32 copy, its scale, the normalised values) and the linear maps' inputs; the norms of
    queries and keys; queries, output and log-sum of the attention; four values of the MLP's width. Per pair: the mask
    as a bias. Per token of the context: keys and values, repeated to all heads.
    """
    text = shape.text
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    norms = 2 * (4 * text.hidden + 4 + 2 * width * text.hidden)
    head_norms = (4 + width) * (queries + keys) + 4 * (text.heads + text.kv_heads)
    attention = 2 * width * queries + 4 * text.heads + width * context
    mlp = 4 * width * text.intermediate
    return tokens * (norms + head_norms + attention + mlp) + 2 * width * queries * context


def vision_layer_bytes(shape: ModelShape, patches: int, width: int) -> int:
    """Return what autograd saves of one vision layer, its input included."""
    vision = shape.vision
    return patches * (10 * width * vision.hidden + 4 * width + 4 * vision.heads + 2 * width * vision.intermediate)


def activation_peaks(shape: ModelShape, training: Training, load: Load, prompts: int) -> dict[str, float]:
    """Return the bytes of activations at each moment that can be the peak of a chunk of alike prompts."""
    text, width, hidden = shape.text, training.width, shape.text.hidden
    new, context = load.path_tokens if load.paths else 0, load.context
    cached = width * kv_values(shape)  # bytes of one token in all layers' caches
    inputs = training.residual * hidden * text.layers
    final_norm = (4 + width) * hidden
    words = load.paths * (load.words + 1) + 1
    rationale_held = load.paths * (new * inputs + cached * (load.tokens + context) + new * context)
    prompt_held = load.tokens * (inputs + cached) + load.tokens**2
    vision_held = _vision_held(shape, training, load)
    layer = _recomputed(shape, training, load.tokens, load.tokens)
    path_layer = load.paths * _recomputed(shape, training, new, context) if load.paths else 0
    if not training.checkpointing:
        prompt_held += text.layers * layer_bytes(shape, load.tokens, load.tokens, width)
        rationale_held += load.paths * text.layers * layer_bytes(shape, new, context, width)
    held = prompt_held + vision_held
    cache_gradients = cached * load.tokens if load.paths else 0
    vision_layer = load.frames * (
        vision_layer_bytes(shape, load.patches, width) + 3 * width * load.patches * shape.vision.intermediate
    )
    norms = final_norm * (load.tokens + load.paths * new)
    peaks = {
        "logits": held + rationale_held + norms + words * text.vocabulary * (8 + width),
        "rationale": held + final_norm * load.tokens + rationale_held + path_layer,
        "prompt": held + cache_gradients + layer,
        "vision": vision_held + vision_layer,
    }
    return {name: prompts * value for name, value in peaks.items()}


def loss_bytes(batch: int, candidates: int, dims: int) -> int:
    """Return what InfoNCE holds of all processes' pairs, for both embeddings of a query and `dims` Matryoshka sizes.

    Per pair and size autograd saves, for each direction, the masked similarities and the softplus's input in float32
    and one mask: 18 bytes. Four more float32 values of the size at hand come and go.
    """
    return 2 * batch * candidates * (18 * dims + 16)


def _recomputed(shape: ModelShape, training: Training, tokens: int, context: int) -> int:
    """Return the bytes of a layer's recomputed activations, and of the gradients that meet at its widest point."""
    width, text = training.width, shape.text
    gradients = tokens * width * (2 * text.intermediate + 2 * text.hidden)
    adapters = 4 * tokens * sum(text.projections()[name][0] for name in training.targets)  # inputs, cast by peft
    return layer_bytes(shape, tokens, context, width) + gradients + adapters


def _vision_held(shape: ModelShape, training: Training, load: Load) -> int:
    """Return what the vision tower keeps: pixels, layers' inputs, mergers, and its tokens; frozen, its tokens alone."""
    vision, width = shape.vision, training.width
    levels = 1 + len(vision.deepstack)
    tokens = 2 * width * levels * visual_tokens(shape, load.patches) * vision.out
    if training.method == "lora":
        return load.frames * tokens
    pixels = width * vision.channels * vision.temporal_patch * vision.patch**2
    layers = training.residual * vision.hidden * (vision.layers + 1)
    mergers = levels * 3 * width * vision.hidden
    held = load.patches * (pixels + layers + mergers) + tokens
    if not training.checkpointing:
        held += vision.layers * vision_layer_bytes(shape, load.patches, width)
    return load.frames * held
