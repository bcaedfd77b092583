"""The nano model before it learns: config, tokenizer, prompt, and random weights."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mmemb_deploy.evaluation.digitchain import MATCH_INSTRUCTION, NAMES, OPERATORS, RESULT_INSTRUCTION
from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.prompts import PromptEncoder, PromptFormat
from mmemb_training.checkpoint import Checkpoint, new_checkpoint
from mmemb_training.nano.digits import RULES, draw_digits
from mmemb_training.tokenizer import train_tokenizer

PIXELS = 1024  # every image becomes about 32 x 32: 4 visual tokens
VIDEO_PIXELS = 8 * PIXELS
MAX_RATIONALE_TOKENS = 64
DIMS = 128, 64


def nano_config(
    encoder: PromptEncoder, vocabulary_size: int, *, layers: int = 4, intermediate: int = 384
) -> Qwen3VLConfig:
    """Return the small config: text 128 wide; vision 96 wide, 2 blocks, one DeepStack level."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary_size,
            "hidden_size": 128,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=encoder.ids[prompts.IMAGE_PAD],
        video_token_id=encoder.ids[prompts.VIDEO_PAD],
        vision_start_token_id=encoder.ids[prompts.VISION_START],
        vision_end_token_id=encoder.ids[prompts.VISION_END],
        tie_word_embeddings=True,
    )


NANO_PROMPT = PromptFormat("Represent the user's input.", RESULT_INSTRUCTION, "")


@cache
def nano_tokenizer() -> Tokenizer:
    """Train the tokenizer on DigitChain's words; any other text falls back to bytes."""
    words = [MATCH_INSTRUCTION, RESULT_INSTRUCTION, NANO_PROMPT.system, "system\nuser\nassistant\n", "<0.5 seconds>"]
    digits = draw_digits("train", 0, 200)
    words += [rule(*told) for told in digits.told.values() for rule in RULES.values()]
    words += [f" {word}" for word in (*NAMES, *OPERATORS, *OPERATORS.values())] + list(NAMES)
    return train_tokenizer(words * 2, vocabulary_size=512)


def nano_checkpoint(seed: int) -> Checkpoint:
    """Return the model with random weights."""
    tokenizer = nano_tokenizer()
    torch.manual_seed(seed)
    config = nano_config(PromptEncoder(tokenizer, NANO_PROMPT), tokenizer.get_vocab_size())
    return new_checkpoint(
        Qwen3VLForConditionalGeneration(config),
        tokenizer,
        NANO_PROMPT,
        pixels=(PIXELS, PIXELS),
        video_pixels=VIDEO_PIXELS,
        dims=DIMS,
        max_rationale_tokens=MAX_RATIONALE_TOKENS,
        provenance={"data": "digitchain", "seed": seed},
    )
