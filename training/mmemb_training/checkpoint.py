"""A checkpoint: a standard transformers folder, plus `mmemb.json` for what transformers has no place for.

config.json, model.safetensors, generation_config.json, tokenizer.json, tokenizer_config.json,
preprocessor_config.json, video_preprocessor_config.json      as transformers writes and reads them
mmemb.json                                                    prompt format, embedding sizes, resizing, provenance
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.preprocess import Resize, VisionSpec
from mmemb_deploy.inputs.prompts import PromptEncoder, PromptFormat
from mmemb_deploy.inputs.rows import RowEncoder
from mmemb_training.weights import gathered, named_weights, write_weights

# The layout of `mmemb_deploy.inputs.prompts` for servers that render chats: system, instruction with its line end,
# images, video, text; the answer begins after `<think>`, as the reasoning path does. A video's pad stands alone: since
# transformers 5.10 a processor puts each patch's time and vision markers in the place of the pad, and of nothing else.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}{{- part.text -}}"
    "{%- elif part.type == 'video' -%}{{- '<|video_pad|>' -}}"
    "{%- else -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<|disc_emb|><think>' -}}{%- endif -%}"
)
FACTS = "mmemb.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
FILES = ("config.json", "tokenizer.json", "preprocessor_config.json", VIDEO_PROCESSOR)  # of every Qwen3-VL, but weights


class CheckpointFacts(BaseModel):
    """What `mmemb.json` holds. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: PromptFormat
    dims: tuple[int, ...]  # embedding sizes that training supports, largest first
    max_rationale_tokens: int
    markers: dict[str, int]
    provenance: dict[str, Any]
    resize: Resize = "transformers"  # by whose rules the sizes in the processors' configs are bounds


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the transformers model, its row encoder, and its facts."""

    model: Any
    rows: RowEncoder
    image_processor: Qwen2VLImageProcessorPil
    facts: CheckpointFacts

    @property
    def vision(self) -> VisionSpec:
        """What preprocessing must know of the vision tower."""
        return self.rows.vision

    def instruction(self, given: str | None) -> str:
        """Return an instruction as given, or the checkpoint's for queries."""
        return self.facts.prompt.asked(given)


def new_checkpoint(
    model: Any,
    tokenizer: Tokenizer,
    prompt: PromptFormat,
    *,
    pixels: tuple[int, int],
    video_pixels: int,
    dims: tuple[int, ...],
    max_rationale_tokens: int,
    provenance: dict[str, Any],
) -> Checkpoint:
    """Return the checkpoint of a model whose images have `pixels` at least and at most, its videos `video_pixels`."""
    vision = model.config.vision_config
    image = Qwen2VLImageProcessorPil(
        size={"shortest_edge": pixels[0], "longest_edge": pixels[1]},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    spec = vision_spec(vision, image, {"shortest_edge": video_pixels, "longest_edge": video_pixels})
    rows = RowEncoder(PromptEncoder(tokenizer, prompt), spec)
    facts = CheckpointFacts(
        prompt=prompt,
        dims=dims,
        max_rationale_tokens=max_rationale_tokens,
        markers=rows.prompt.ids,
        provenance=provenance,
    )
    return Checkpoint(model, rows, image, facts)


def save_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    weight: Callable[[str], torch.Tensor] | None = None,
    provenance: dict[str, Any] | None = None,
    writes: bool = True,
) -> None:
    """Write a checkpoint; `provenance` adds to what it says of its origin, `weight` gives values for the model's own.

    Sharded weights are gathered one after the other: all their processes call this, and the one that `writes` holds a
    file's worth of them. The facts come last: a folder that has them is whole.
    """
    model, weights = checkpoint.model, named_weights(checkpoint.model)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    write_weights(weights, weight or (lambda name: gathered(weights[name])), folder, writes=writes)
    if writes:
        _save_facts(checkpoint, folder, provenance=provenance)


def _save_facts(checkpoint: Checkpoint, folder: Path, *, provenance: dict[str, Any] | None = None) -> None:
    """Write all of a checkpoint but its weights and its config."""
    spec = checkpoint.vision
    PreTrainedTokenizerFast(
        tokenizer_object=checkpoint.rows.prompt.tokenizer,
        eos_token=prompts.STOP,
        pad_token=prompts.PAD,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    checkpoint.image_processor.save_pretrained(folder)
    video = {
        "patch_size": spec.patch_size,
        "temporal_patch_size": spec.temporal_patch_size,
        "merge_size": spec.merge_size,
        "image_mean": spec.image_mean,
        "image_std": spec.image_std,
        "size": {"shortest_edge": spec.video_min_pixels, "longest_edge": spec.video_max_pixels},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    (folder / VIDEO_PROCESSOR).write_text(json.dumps(video, indent=2))
    origin = checkpoint.facts.provenance | (provenance or {})
    facts = checkpoint.facts.model_copy(update={"provenance": origin})
    (folder / FACTS).write_text(facts.model_dump_json(indent=2))


def load_checkpoint(folder: Path, *, dtype: str = "float32") -> Checkpoint:
    """Load a checkpoint, its weights as `dtype`. Raises OptionError if a file is missing or `mmemb.json` malformed."""
    facts = _read_facts(folder)
    return _assemble(folder, facts, AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype))


def outline_checkpoint(folder: Path, *, dtype: str = "float32") -> Checkpoint:
    """Return a checkpoint whose model has shapes and types but no weights, for `trace` to run in `model.fake_mode`.

    Raises OptionError as `load_checkpoint` does.
    """
    facts = _read_facts(folder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
    model.fake_mode = mode
    return _assemble(folder, facts, model)


def _read_facts(folder: Path) -> CheckpointFacts:
    for name in (*FILES, FACTS):
        if not (folder / name).is_file():
            hint = "; of a public Qwen3-VL-Embedding, `mmemb train adopt` makes one" if name == FACTS else ""
            raise OptionError(f"{folder} is not an MMEmb-R1 checkpoint: it has no {name}{hint}")
    try:
        return CheckpointFacts.model_validate_json((folder / FACTS).read_text())
    except ValidationError as error:
        raise OptionError(f"{folder / FACTS} is malformed: {error}") from error


def _assemble(folder: Path, facts: CheckpointFacts, model: Any) -> Checkpoint:
    image = Qwen2VLImageProcessorPil.from_pretrained(folder)
    video = json.loads((folder / VIDEO_PROCESSOR).read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vision = vision_spec(model.config.vision_config, image, video["size"], facts.resize)
    return Checkpoint(model.eval(), RowEncoder(PromptEncoder(tokenizer, facts.prompt), vision), image, facts)


def vision_spec(
    config: Any, image: Qwen2VLImageProcessorPil, video_size: dict[str, int], resize: Resize = "transformers"
) -> VisionSpec:
    """Read a VisionSpec off a `Qwen3VLVisionConfig`, its image processor and its video processor's size."""
    size: Any = image.size
    return VisionSpec(
        patch_size=config.patch_size,
        merge_size=config.spatial_merge_size,
        temporal_patch_size=config.temporal_patch_size,
        min_pixels=size["shortest_edge"],
        max_pixels=size["longest_edge"],
        video_min_pixels=video_size["shortest_edge"],
        video_max_pixels=video_size["longest_edge"],
        image_mean=tuple(image.image_mean),
        image_std=tuple(image.image_std),
        position_side=int(config.num_position_embeddings**0.5),
        head_dim=config.hidden_size // config.num_heads,
        rope_theta=config.rope_parameters["rope_theta"],
        resize=resize,
    )
