"""A checkpoint of random weights at any shape, to measure speed and memory with; written one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.prompts import PromptEncoder
from mmemb_training.checkpoint import new_checkpoint, save_checkpoint
from mmemb_training.prepare import PROMPT
from mmemb_training.recipes.shapes import TEXT_KEYS, VISION_KEYS, ModelShape
from mmemb_training.tokenizer import train_tokenizer
from mmemb_training.weights import named_weights

PIXELS = 256 * 32 * 32  # of an image: 256 visual tokens
STD = 0.02  # of every matrix


def random_checkpoint(shape: ModelShape, folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Write a checkpoint in the shape's own config; its tokenizer knows bytes and markers.

    Raises OptionError if the folder exists.
    """
    if folder.exists():
        raise OptionError(f"{folder} exists: choose another folder")
    tokenizer = train_tokenizer([PROMPT.system], 300)
    config = model_config(shape, PromptEncoder(tokenizer, PROMPT))
    with torch.device("meta"):
        model: Any = Qwen3VLForConditionalGeneration(config)
    model = model.to(dtype)
    model.tie_weights()
    checkpoint = new_checkpoint(
        model,
        tokenizer,
        PROMPT,
        pixels=(PIXELS, PIXELS),
        video_pixels=8 * PIXELS,
        dims=(shape.text.hidden,),
        max_rationale_tokens=64,
        provenance={"weights": "random", "shape": shape.name, "seed": seed},
    )
    generator, outline = torch.Generator().manual_seed(seed), named_weights(model)

    def drawn(name: str) -> torch.Tensor:
        weight = outline[name]
        if weight.ndim == 1:
            return torch.full(weight.shape, float(not name.endswith(".bias")), dtype=weight.dtype)
        return (torch.randn(weight.shape, generator=generator) * STD).to(weight.dtype)

    save_checkpoint(checkpoint, folder, weight=drawn)


def model_config(shape: ModelShape, encoder: PromptEncoder) -> Qwen3VLConfig:
    """Return the transformers config of a shape."""
    text, vision, ids = shape.text, shape.vision, encoder.ids
    section = text.head_dim // 2
    side = (section - 2 * (section // 3 // 2 * 2)), section // 3 // 2 * 2
    return Qwen3VLConfig(
        text_config={key: getattr(text, field) for field, key in TEXT_KEYS.items()}
        | {
            "max_position_embeddings": 262144,
            "tie_word_embeddings": text.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [side[0], side[1], side[1]],
            },
        },
        vision_config={key: getattr(vision, field) for field, key in VISION_KEYS.items()}
        | {"deepstack_visual_indexes": list(vision.deepstack)},
        image_token_id=ids[prompts.IMAGE_PAD],
        video_token_id=ids[prompts.VIDEO_PAD],
        vision_start_token_id=ids[prompts.VISION_START],
        vision_end_token_id=ids[prompts.VISION_END],
        tie_word_embeddings=text.tied,
    )
