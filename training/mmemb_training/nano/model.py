"""The recipe of the embedded default model: a Qwen3-VL of 1.5M parameters that learns DigitChain in one joint run."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import Qwen3VLConfig

from mmemb_deploy import prompts
from mmemb_deploy.digitchain import MATCH_INSTRUCTION, NAMES, OPERATORS, RESULT_INSTRUCTION, DigitChain
from mmemb_deploy.errors import OptionError
from mmemb_deploy.preprocess import VisionSpec
from mmemb_deploy.prompts import PromptEncoder, PromptFormat
from mmemb_training.tokenizer import train_tokenizer

PIXELS = 1024  # every image becomes about 32 x 32: 4 visual tokens
VIDEO_PIXELS = 8 * PIXELS
MAX_RATIONALE_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class NanoRecipe:
    """Everything that decides the outcome of a run."""

    seed: int = 0
    steps: int = 1800
    batch: int = 96  # queries of a step
    learning_rate: float = 2e-3  # AdamW's, after warm-up, before cosine decay
    warmup: int = 100  # steps
    weight_decay: float = 0.05
    gradient_norm: float = 1.0  # clipped to this
    temperature: float = 0.02
    lambda_g: float = 2.0  # its loss is per token, and small beside InfoNCE's at this temperature
    lambda_d: float = 1.0
    dims: tuple[int, ...] = (128, 64)
    micro_batches: int = 4  # a step's queries, sorted by length, are padded in this many groups
    save_every: int = 200  # steps

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate", "temperature", "micro_batches", "save_every"):
            if getattr(self, name) <= 0:
                raise OptionError(f"{name} is {getattr(self, name)}: it must be positive")


def nano_config(encoder: PromptEncoder, vocabulary_size: int) -> Qwen3VLConfig:
    """Return the small config: text 128 wide, 4 layers; vision 96 wide, 2 blocks, one DeepStack level."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary_size, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2, "hidden_size": 96, "intermediate_size": 384, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 128, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=encoder.ids[prompts.IMAGE_PAD],
        video_token_id=encoder.ids[prompts.VIDEO_PAD],
        vision_start_token_id=encoder.ids[prompts.VISION_START],
        vision_end_token_id=encoder.ids[prompts.VISION_END],
        tie_word_embeddings=True,
    )  # fmt: skip


NANO_PROMPT = PromptFormat("Represent the user's input.", RESULT_INSTRUCTION, "")
NANO_VISION = VisionSpec(
    patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=PIXELS, max_pixels=PIXELS,
    video_min_pixels=VIDEO_PIXELS, video_max_pixels=VIDEO_PIXELS, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5),
    position_side=8, head_dim=24, rope_theta=10000.0,
)  # fmt: skip


def nano_tokenizer() -> Tokenizer:
    """Train the tokenizer on DigitChain's words; any other text falls back to bytes."""
    words = [MATCH_INSTRUCTION, RESULT_INSTRUCTION, NANO_PROMPT.system, "system\nuser\nassistant\n", "<0.5 seconds>"]
    words += [example.rationale for example in DigitChain("train", 0).mixed(200)]
    words += [f" {word}" for word in (*NAMES, *OPERATORS, *OPERATORS.values())] + list(NAMES)
    return train_tokenizer(words * 2, vocabulary_size=400)
