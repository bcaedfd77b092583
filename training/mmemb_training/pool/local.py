"""A worker that runs a Qwen-VL chat model here, with transformers.

transformers builds the full processor of these models only beside torchvision, for its video part. Frames are shown as
images here, so the tokenizer and the PIL image processor are enough, and what the processor would do between them is
done in `_batch`: each image token is repeated once per merged patch. Serve any other model, and use EndpointWorker.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmemb_deploy.errors import InputError, OptionError, check_known
from mmemb_training.pool.endpoint import plain_rationale, shown_parts
from mmemb_training.pool.workers import REQUEST, Written
from mmemb_training.samples import Question

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class _Prompt:
    """A question as the model reads it: the chat's text with one image token per image, and the images."""

    text: str
    images: list[Image.Image]


class TransformersWorker:
    """Samples rationales from a local folder's or a hub id's model, `batch` questions at a time.

    What is not said here of sampling, such as top_p, is as the model's generation_config has it. The same questions in
    the same batches give the same rationales, by `seed`, on the same device. Raises OptionError for a model of another
    family or one without a chat template.
    """

    def __init__(
        self,
        name: str,
        source: str | Path,
        *,
        samples: int,
        temperature: float = 1.0,
        max_tokens: int = 1024,
        batch: int = 8,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "auto",
        max_frames: int = 16,
    ) -> None:
        for option, value in {"samples": samples, "batch": batch, "max_frames": max_frames}.items():
            if value < 1:
                raise OptionError(f"{option} is {value}; pass at least 1")
        config = AutoConfig.from_pretrained(source)
        check_known("model type", config.model_type, MODEL_TYPES)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source, padding_side="left")
        if not self._tokenizer.chat_template:
            raise OptionError(f"{source} has no chat template: pass an instruct or thinking model, not a base model")
        self._image_processor = Qwen2VLImageProcessorPil.from_pretrained(source)
        self._image_token: Any = self._tokenizer.convert_ids_to_tokens(config.image_token_id)
        self._image_token_id: int = config.image_token_id
        model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        self._model = model.to(device).eval()
        self.name = name
        self.samples = samples
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._batch_size = batch
        self._seed = seed
        self._max_frames = max_frames

    def write(self, questions: Sequence[Question]) -> list[Written]:
        """Return what was written for each question, or why its content cannot be shown to the model."""
        written: list[Written] = []
        for start in range(0, len(questions), self._batch_size):
            written += self._write_batch(questions[start : start + self._batch_size])
        return written

    def _write_batch(self, questions: Sequence[Question]) -> list[Written]:
        prompts: list[_Prompt] = []
        errors: dict[int, str] = {}
        for index, question in enumerate(questions):
            try:
                prompts.append(self._prompt(question))
            except InputError as error:
                errors[index] = f"{type(error).__name__}: {error}"
        keys = "\n".join(question.key for question in questions)
        texts = iter(self._generate(prompts, seed=zlib.crc32(keys.encode(), self._seed)) if prompts else [])
        return [Written((), errors[index]) if index in errors else next(texts) for index in range(len(questions))]

    def _prompt(self, question: Question) -> _Prompt:
        parts = shown_parts(question, self._max_frames)
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        chat = [
            {"role": "system", "content": [{"type": "text", "text": REQUEST}]},
            {"role": "user", "content": content},
        ]
        text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [part for part in parts if not isinstance(part, str)]
        if text.count(self._image_token) != len(images):
            raise InputError(f"its text spells {self._image_token}, which the model would take for an image; reword it")
        return _Prompt(text, images)

    def _generate(self, prompts: Sequence[_Prompt], *, seed: int) -> list[Written]:
        inputs = self._batch(prompts)
        length = inputs["input_ids"].shape[1]
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            tokens_RS = self._model.generate(
                **inputs,
                do_sample=True,
                temperature=self._temperature,
                max_new_tokens=self._max_tokens,
                num_return_sequences=self.samples,
            )
        texts = self._tokenizer.batch_decode(tokens_RS[:, length:], skip_special_tokens=True)
        rationales = [plain_rationale(text) for text in texts]
        return [
            Written(tuple(rationales[start : start + self.samples]), None)
            for start in range(0, len(rationales), self.samples)
        ]

    def _batch(self, prompts: Sequence[_Prompt]) -> dict[str, Any]:
        """Return the model's inputs, padded on the left."""
        images = [image for prompt in prompts for image in prompt.images]
        vision = self._image_processor(images, return_tensors="pt") if images else {}
        merged = self._image_processor.merge_size**2
        repeats = iter([int(grid.prod()) // merged for grid in vision["image_grid_thw"]] if images else [])
        texts: list[str] = []
        for prompt in prompts:
            first, *rest = prompt.text.split(self._image_token)
            texts.append(first + "".join(self._image_token * next(repeats) + after for after in rest))
        tokens = self._tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        kinds = (tokens["input_ids"] == self._image_token_id).int()  # 1 for images, as M-RoPE's positions ask
        inputs = {**tokens, **vision, "mm_token_type_ids": kinds}
        return {name: value.to(self._model.device) for name, value in inputs.items() if name != "token_type_ids"}
