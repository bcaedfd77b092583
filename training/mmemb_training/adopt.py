"""A public Qwen3-VL-Embedding as a checkpoint that embeds and never reasons (arXiv 2601.04720).

Layout, pixel bounds, pooling and sizes are those of the model's public inference script and card. Images and frames are
resized, and frames timed, as qwen-vl-utils 0.0.14 does it, to which the script leaves that. The script thins a list of
more than 64 frames out to 64; here every frame counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.prompts import PromptEncoder
from mmemb_training.checkpoint import FACTS, FILES, VIDEO_PROCESSOR, CheckpointFacts
from mmemb_training.prepare import PROMPT as START

PROMPT = replace(START, layout="qwen3-vl-embedding")
IMAGE_TOKENS = 4, 1800  # fewest and most of an image
VIDEO_TOKENS = 128, 7680  # fewest of a frame, and most of a video
SMALLEST_DIM = 64
OWN = (FACTS, "preprocessor_config.json", VIDEO_PROCESSOR)  # files of a checkpoint that are written, not linked


def adopt(source: Path, folder: Path) -> CheckpointFacts:
    """Make a checkpoint folder of a public one: links to its files, and what `mmemb export` must know beside them.

    Raises OptionError if `folder` exists, if `source` is no Qwen3-VL, lacks a file, or renders its chats otherwise.
    """
    if folder.exists():
        raise OptionError(f"{folder} exists: choose another folder")
    for name in FILES:
        if not (source / name).is_file():
            raise OptionError(f"{source} is not a Qwen3-VL-Embedding: it has no {name}")
    config: Any = AutoConfig.from_pretrained(source)
    if config.model_type != "qwen3_vl":
        raise OptionError(f"{source} is a {config.model_type}: pass a Qwen3-VL-Embedding")
    prompt = PromptEncoder(Tokenizer.from_file(str(source / "tokenizer.json")), PROMPT)
    _check_template(source, prompt)
    hidden: int = config.text_config.hidden_size
    facts = CheckpointFacts(
        prompt=PROMPT,
        dims=(hidden, *(half for half in _halves(hidden) if half >= SMALLEST_DIM)),
        max_rationale_tokens=0,
        markers=prompt.ids,
        provenance={"source": source.name},
        resize="qwen-vl-utils",
    )
    vision = config.vision_config
    pixels = (vision.patch_size * vision.spatial_merge_size) ** 2  # of a visual token
    image, video = (
        {"shortest_edge": fewest * pixels, "longest_edge": most * pixels}
        for fewest, most in (IMAGE_TOKENS, VIDEO_TOKENS)
    )
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in OWN:
            (folder / path.name).symlink_to(path.resolve())
    Qwen2VLImageProcessorPil.from_pretrained(source, size=image).save_pretrained(folder)
    processor = json.loads((source / VIDEO_PROCESSOR).read_text()) | {"size": video}
    (folder / VIDEO_PROCESSOR).write_text(json.dumps(processor, indent=2))
    (folder / FACTS).write_text(facts.model_dump_json(indent=2))
    return facts


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _check_template(source: Path, prompt: PromptEncoder) -> None:
    """Hold our layout against the chat template of the source: the same text must become the same ids."""
    text, instruction = "a text\nof two lines", "Find it."
    chat = [
        {"role": role, "content": [{"type": "text", "text": words}]}
        for role, words in (("system", instruction), ("user", text))
    ]
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    rendered: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if tokenizer(rendered)["input_ids"] != prompt.prompt(instruction, text):
        raise OptionError(
            f"{source} renders a chat as {json.dumps(rendered)}, which is not the layout of Qwen3-VL-Embedding"
        )
