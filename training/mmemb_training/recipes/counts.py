"""Operations and bytes of a prompt, from a model's shape: closed formulas, held against torch's own by tests.

A product of an (m, k) and a (k, n) matrix is 2 m k n operations. Norms, activations and softmax are left out: they are
bound by memory. Attention counts every pair of tokens, causal or not, although kernels may skip half of a prompt's.

The bytes of a layer are exact in bf16; in float32 some copies fall away. `activation_bytes` builds on them and follows
`mmemb_training.encoder`, which reads a prompt, then its rationales from the prompt's KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_training.recipes.settings import StartModel, TrainedWeights
from mmemb_training.recipes.shapes import ModelShape

TEXT_TOKENS = 128  # system prompt, instruction and words of a prompt with an image; assumed


@dataclass(frozen=True, kw_only=True)
class PromptSize:
    """A prompt, and the rationales that follow it from its KV cache."""

    tokens: int  # of the prompt, visual ones included
    frames: int = 0  # images, or pairs of video frames: each is encoded by itself
    patches: int = 0  # of a frame
    rationales: int = 0
    rationale_tokens: int = 0  # of each

    @property
    def path_tokens(self) -> int:
        """Tokens of a rationale and its markers."""
        return self.rationale_tokens + PATH_MARKERS

    @property
    def context(self) -> int:
        """Tokens that the end of a rationale sees."""
        return self.tokens + self.path_tokens

    def followed(self, rationales: int, tokens: float) -> PromptSize:
        """Return the prompt followed by rationales."""
        return replace(self, rationales=rationales, rationale_tokens=max(1, round(tokens)))


def longest_prompt(shape: ModelShape, model: StartModel) -> PromptSize:
    """Return a prompt at its limit, filled with images or with one video, whichever has more patches.

    Raises OptionError for pixels whose visual tokens exceed the limit on tokens.
    """
    left = model.planned_tokens - TEXT_TOKENS
    pairs = frame_pairs(shape, model)
    image, frame = _patches(shape, model.max_pixels), _patches(shape, model.video_max_pixels)
    for name, tokens in (
        ("max_pixels", _visual_tokens(shape, image)),
        ("video_max_pixels", pairs * _visual_tokens(shape, frame)),
    ):
        if tokens > left:
            raise OptionError(
                f"model.{name} is {getattr(model, name)}: that is {tokens} visual tokens, and model.planned_tokens "
                f"({model.planned_tokens}) leaves {max(left, 0)} beside {TEXT_TOKENS} of text; lower it or raise that"
            )
    images = PromptSize(tokens=model.planned_tokens, frames=left // _visual_tokens(shape, image), patches=image)
    video = PromptSize(tokens=model.planned_tokens, frames=pairs, patches=frame)
    return max(images, video, key=lambda prompt: prompt.frames * prompt.patches)


def mean_prompt(shape: ModelShape, model: StartModel, fill: float) -> PromptSize:
    """Return a prompt with one image of `fill` times the most pixels, and TEXT_TOKENS of text."""
    patches = _patches(shape, round(fill * model.max_pixels))
    return PromptSize(tokens=TEXT_TOKENS + _visual_tokens(shape, patches), frames=1, patches=patches)


def frame_pairs(shape: ModelShape, model: StartModel) -> int:
    """Return how many patches in time a video at its limit has."""
    return -(-model.video_frames // shape.vision.temporal_patch)


def _patches(shape: ModelShape, pixels: int) -> int:
    """Return the patches of a frame of at most so many pixels, a whole number of visual tokens, at least one."""
    unit = shape.vision.merge**2
    return max(1, pixels // (shape.vision.patch**2 * unit)) * unit


def _visual_tokens(shape: ModelShape, patches: int) -> int:
    return patches // shape.vision.merge**2


def forward_flops(shape: ModelShape, prompt: PromptSize) -> int:
    """Return the operations of one reading: vision, prompt, decision, rationales and the logits of their tokens."""
    return vision_flops(shape, prompt) + text_flops(shape, prompt)


def vision_flops(shape: ModelShape, prompt: PromptSize) -> int:
    """Return the operations of the vision tower and its mergers; a patch attends within its frame."""
    vision = shape.vision
    matrices = vision.patch_matrix() + vision.layers * vision.layer_matrices()
    mergers = (1 + len(vision.deepstack)) * vision.merger_matrices()
    attention = 4 * prompt.patches**2 * vision.hidden * vision.layers
    linear = 2 * matrices * prompt.patches + 2 * mergers * _visual_tokens(shape, prompt.patches)
    return prompt.frames * (linear + attention)


def text_flops(shape: ModelShape, prompt: PromptSize) -> int:
    """Return the operations of the language model on a prompt and its rationales, with the logits that are read."""
    head = 2 * shape.text.embedding_parameters()
    path = layer_flops(shape, prompt.path_tokens, prompt.context) + head * (prompt.rationale_tokens + 1)
    return layer_flops(shape, prompt.tokens, prompt.tokens) + head + prompt.rationales * path


def layer_flops(shape: ModelShape, tokens: int, context: int) -> int:
    """Return the operations of all text layers on new tokens that attend to a context, themselves included."""
    text = shape.text
    attention = 4 * tokens * context * text.heads * text.head_dim
    return text.layers * (2 * text.layer_matrices() * tokens + attention)


def generated_flops(shape: ModelShape, prompt: PromptSize) -> int:
    """Return the mean operations of one generated token: layers and head, at half of the rationale."""
    halfway = prompt.tokens + prompt.rationale_tokens // 2
    return layer_flops(shape, 1, halfway) + 2 * shape.text.embedding_parameters()


def cached_values(shape: ModelShape) -> int:
    """Return the values that all layers cache of one token."""
    return 2 * shape.text.layers * shape.text.kv_heads * shape.text.head_dim


def layer_bytes(shape: ModelShape, tokens: int, context: int, width: int) -> int:
    """Return what autograd saves of one text layer, for new tokens that attend to a context; `width` bytes a value.

    Per token: two RMSNorms (a float32 copy, its scale, the normalised values) and the linear maps' inputs; the norms of
    queries and keys; queries, output and log-sum of the attention; four values of the MLP's width. Per token of the
    context: keys and values. What follows a prompt attends by a mask: per pair its bias, and keys and values are
    repeated to all heads.
    """
    text = shape.text
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    masked = context > tokens
    norms = 2 * (4 * text.hidden + 4 + 2 * width * text.hidden)
    head_norms = (4 + width) * (queries + keys) + 4 * (text.heads + text.kv_heads)
    attention = 2 * width * queries + 4 * text.heads + width * context * masked
    mlp = 4 * width * text.intermediate
    return tokens * (norms + head_norms + attention + mlp) + 2 * width * (queries if masked else keys) * context


def vision_layer_bytes(shape: ModelShape, patches: int, width: int) -> int:
    """Return what autograd saves of one vision layer, its input included."""
    vision = shape.vision
    return patches * (10 * width * vision.hidden + 4 * width + 4 * vision.heads + 2 * width * vision.intermediate)


def activation_bytes(shape: ModelShape, weights: TrainedWeights, gpus: int, prompt: PromptSize) -> int:
    """Return the peak of activations, by prompt: what waits for the backward pass, at that pass's widest moment.

    The widest is where the logits are differentiated, or where a layer is recomputed: of the rationales, then of the
    prompt, whose caches have their gradients by then, then of the vision tower.
    """
    text, vision, width = shape.text, shape.vision, weights.value_bytes
    path, context, written = prompt.path_tokens, prompt.context, prompt.rationales * prompt.path_tokens
    cached = width * cached_values(shape)  # bytes of one token in all layers' caches
    # Bytes of a value between layers: autocast, which one GPU trains all weights with, keeps it in float32.
    residual = 4 if weights.adapters is None and gpus == 1 else width
    inputs, norm = residual * text.hidden * text.layers, (4 + width) * text.hidden  # of a token; the last norm
    in_prompt = prompt.tokens * (inputs + cached * min(1, prompt.rationales) + norm)
    in_paths = written * (inputs + norm + context)
    in_vision = 2 * width * (1 + len(vision.deepstack)) * vision.out * (prompt.patches // vision.merge**2)
    if weights.adapters is None:
        pixels = width * vision.channels * vision.temporal_patch * vision.patch**2
        mergers = 3 * width * (1 + len(vision.deepstack)) * vision.hidden
        in_vision += prompt.patches * (pixels + residual * (vision.layers + 1) * vision.hidden + mergers)
    prompt_layer = layer_bytes(shape, prompt.tokens, prompt.tokens, width)
    copied = cached // text.layers * (prompt.tokens + context)  # of the prompt's cache, and with the rationale's
    path_layer = prompt.rationales * layer_bytes(shape, path, context, width)
    vision_layer = vision_layer_bytes(shape, prompt.patches, width)
    if not weights.gradient_checkpointing:
        in_prompt += text.layers * prompt_layer
        in_paths += text.layers * path_layer
        in_vision += 0 if weights.adapters else vision.layers * vision_layer
    # Gradients meet at a layer's widest point; peft casts the inputs of adapters.
    adapted = sum(text.projections()[name][0] for name in weights.adapters.targets) if weights.adapters else 0
    gradients = 2 * width * (text.intermediate + text.hidden) + 4 * adapted  # of a token
    logits = (prompt.rationales * (prompt.rationale_tokens + 1) + 1) * text.vocabulary * (8 + width)
    in_vision *= prompt.frames
    return max(
        in_vision + in_prompt + in_paths + max(logits, path_layer + prompt.rationales * copied + written * gradients),
        in_vision + in_prompt + prompt_layer + prompt.tokens * (gradients + cached * min(1, prompt.rationales)),
        in_vision + prompt.frames * (vision_layer + 3 * width * prompt.patches * vision.intermediate),
    )


def loss_bytes(batch: int, candidates: int, dims: int) -> int:
    """Return what InfoNCE holds of all processes' pairs, for both embeddings of a query and `dims` Matryoshka sizes.

    Per pair and size autograd saves, for each direction, the masked similarities and the softplus's input in float32
    and one mask: 18 bytes. Four more float32 values of the size at hand come and go.
    """
    return 2 * batch * candidates * (18 * dims + 16)
