"""The model that learns strips, before it learns: the nano config, a tokenizer of its words, and random weights."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLForConditionalGeneration

from mmemb_deploy.evaluation.digitchain import NAMES
from mmemb_deploy.inputs.prompts import PromptEncoder, PromptFormat
from mmemb_training.checkpoint import Checkpoint, new_checkpoint
from mmemb_training.nano.model import nano_config
from mmemb_training.strips.questions import INSTRUCTIONS, SIDE, draw_strips
from mmemb_training.strips.workers import empty, write
from mmemb_training.tokenizer import train_tokenizer

MAX_RATIONALE_TOKENS = 48
DIMS = (128,)
PROMPT = PromptFormat("Embed.", INSTRUCTIONS["result"], "")


@cache
def strips_tokenizer() -> Tokenizer:
    """Train the tokenizer on the words of strips; digits and signs stay tokens of their own."""
    told = draw_strips("train", 0, 200).told.values()
    rationales = [write(strip.aspect, strip) for strip in told]
    words = [*INSTRUCTIONS.values(), PROMPT.system, "system\nuser\nassistant\n", *NAMES]
    words += [form for rationale in rationales for form in (rationale, empty(rationale))]
    words += [" ".join(strip.operators) for strip in told]
    return train_tokenizer(words * 2, vocabulary_size=400)


def strips_checkpoint(seed: int) -> Checkpoint:
    """Return the model with random weights."""
    tokenizer = strips_tokenizer()
    torch.manual_seed(seed)
    encoder = PromptEncoder(tokenizer, PROMPT)
    config = nano_config(encoder, tokenizer.get_vocab_size(), layers=3, intermediate=256)
    return new_checkpoint(
        Qwen3VLForConditionalGeneration(config),
        tokenizer,
        PROMPT,
        pixels=(SIDE**2, 8 * SIDE**2),  # a strip stays as it is: a digit is one visual token
        video_pixels=SIDE**2,
        dims=DIMS,
        max_rationale_tokens=MAX_RATIONALE_TOKENS,
        provenance={"data": "strips", "seed": seed},
    )
