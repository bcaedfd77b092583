"""A public Qwen3-VL, Instruct or Embedding, as the checkpoint that training starts from: two more tokens, its facts.

`<|disc_emb|>` and `<|gen_emb|>` get rows that start as the mean of all others (Hewitt 2021): likely enough to be read,
never likely to be written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.hub import cached_file

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.prompts import MARKERS, PromptEncoder, PromptFormat
from mmemb_deploy.inputs.rows import RowEncoder
from mmemb_training.checkpoint import VIDEO_PROCESSOR, Checkpoint, CheckpointFacts, save_checkpoint, vision_spec

ROWS_MULTIPLE = 64  # of the embedding table, where it has to grow
PROMPT = PromptFormat("Represent the user's input.", "Represent the user's input.", "Represent the user's input.")


def prepare(
    source: str,
    folder: Path,
    *,
    dims: tuple[int, ...],
    max_rationale_tokens: int,
    max_pixels: int | None = None,
    video_max_pixels: int | None = None,
    prompt: PromptFormat = PROMPT,
) -> Checkpoint:
    """Write the checkpoint that training starts from; `source` is a folder or a hub id. Weights keep their type.

    `max_pixels` bounds an image and `video_max_pixels` a whole video, after resizing; the source's bounds hold where
    they are None. Raises OptionError if the source is no Qwen3-VL, or a size of `dims` exceeds its hidden size.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    if model.config.model_type != "qwen3_vl":
        raise OptionError(f"{source} is a {model.config.model_type}: pass a Qwen3-VL")
    hidden = model.config.text_config.hidden_size
    if dims[0] > hidden:
        raise OptionError(f"dims is {list(dims)}: the largest exceeds the hidden size {hidden} of {source}")
    tokenizer = AutoTokenizer.from_pretrained(source).backend_tokenizer
    missing = [marker for marker in MARKERS if tokenizer.token_to_id(marker) is None]
    tokenizer.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in missing])
    known: dict[str, int] = tokenizer.get_vocab()
    _grow(model, [known[marker] for marker in missing])
    image: Any = Qwen2VLImageProcessorPil.from_pretrained(source)
    if max_pixels is not None:
        size = {"shortest_edge": image.size["shortest_edge"], "longest_edge": max_pixels}
        image = Qwen2VLImageProcessorPil.from_pretrained(source, size=size)
    found: Any = cached_file(source, VIDEO_PROCESSOR)
    video = json.loads(Path(found).read_text())["size"]
    if video_max_pixels is not None:
        video = video | {"longest_edge": video_max_pixels}
    rows = RowEncoder(PromptEncoder(tokenizer, prompt), vision_spec(model.config.vision_config, image, video))
    facts = CheckpointFacts(
        prompt=prompt,
        dims=dims,
        max_rationale_tokens=max_rationale_tokens,
        markers=rows.prompt.ids,
        provenance={"source": source, "added": missing},
    )
    checkpoint = Checkpoint(model, rows, image, facts)
    save_checkpoint(checkpoint, folder)
    return checkpoint


def _grow(model: Any, new: list[int]) -> None:
    """Give new token ids their rows, in the embedding and in the head."""
    if not new:
        return
    known = min(new)
    if max(new) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(new) + 1, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[new] = table[:known].float().mean(dim=0).to(table.dtype)
