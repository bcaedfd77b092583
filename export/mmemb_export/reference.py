"""The checkpoint run by transformers alone, its own processor included: what the runtime is certified against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmemb_deploy.inputs import prompts
from mmemb_deploy.inputs.parse import Request
from mmemb_deploy.inputs.preprocess import Floats, Visual, resize_image
from mmemb_deploy.inputs.rows import Row
from mmemb_training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Expected:
    """One full forward pass over a prompt and a rationale's path, which is empty in a layout without reasoning."""

    direct_D: Floats  # at the prompt's last token, L2-normalised
    score: float  # probability of `<think>` against stop; NaN in a layout without reasoning
    reasoned_D: Floats  # at the path's last token, L2-normalised
    greedy: list[int]  # the likeliest token after `<think>` and after every token that follows


class Reference:
    """`Qwen3VLForConditionalGeneration` and `Qwen2VLImageProcessorPil`, as transformers ships them.

    Token ids come from the shared prompt code; `mmemb_deploy.inputs.preprocess` resizes the frames of a video, since
    transformers' video processor needs torchvision, and images that qwen-vl-utils would resize.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = checkpoint.model
        self._prompt = checkpoint.rows.prompt
        self._vision = checkpoint.vision
        self._processor = checkpoint.image_processor

    def run(self, request: Request, row: Row, rationale_ids: Sequence[int]) -> Expected:
        """Forward a prompt followed by `<think>`, a rationale, `</think>` and `<|gen_emb|>`.

        In a layout without reasoning the prompt stands alone.
        """
        ids, layout = self._prompt.ids, self._prompt.layout
        path = self._prompt.path(rationale_ids) if layout.reasons else []
        token_ids_1S = torch.tensor([[*row.token_ids_S.tolist(), *path]])
        kinds_1S = (token_ids_1S == ids[prompts.IMAGE_PAD]) + 2 * (token_ids_1S == ids[prompts.VIDEO_PAD])
        inputs: dict[str, Any] = {
            "input_ids": token_ids_1S,
            "attention_mask": torch.ones_like(token_ids_1S),
            "mm_token_type_ids": kinds_1S.int(),
        }
        if request.images:
            images = list(request.images)
            resize = self._vision.resize == "transformers"
            if not resize:
                images = [Image.fromarray(resize_image(image, self._vision).pixels_THWC[0]) for image in images]
            processed = self._processor(images=images, do_resize=resize, return_tensors="pt")
            inputs |= {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}
        still = len(request.images)
        frames = row.visuals[: -still or None] if layout.video_first else row.visuals[still:]
        if frames:
            inputs |= {
                "pixel_values_videos": self._patches(frames),
                "video_grid_thw": torch.tensor([[len(frames), *frames[0].grid]]),
            }
        with torch.no_grad():
            self._model.model.rope_deltas = None
            hidden_SD: Tensor = self._model.model(**inputs).last_hidden_state[0]
            disc = row.length - 1
            logits_TV = self._model.lm_head(hidden_SD[disc : disc + len(rationale_ids) + 2])
        score = float("nan")
        if layout.reasons:
            score = float(torch.sigmoid(logits_TV[0, ids[prompts.THINK]] - logits_TV[0, ids[prompts.STOP]]))
        return Expected(
            direct_D=F.normalize(hidden_SD[disc], dim=-1).numpy(),
            score=score,
            reasoned_D=F.normalize(hidden_SD[-1], dim=-1).numpy(),
            greedy=logits_TV[1:].argmax(dim=-1).tolist(),
        )

    def _patches(self, frames: Sequence[Visual]) -> Tensor:
        """Return the patches of a video, each put together of those that its frames have as images.

        N temporal patches, T frames of one, P patches, C channels; an image repeats its frame in place of the others.
        """
        step = self._vision.temporal_patch_size
        images = [Image.fromarray(pixels) for frame in frames for pixels in frame.pixels_THWC]
        stills = self._processor(images=images, do_resize=False, return_tensors="pt")["pixel_values"]
        stills_NTPC = stills.unflatten(0, (len(frames), step, -1)).unflatten(-1, (3, step, -1))[..., 0, :]
        values: Tensor = stills_NTPC.permute(0, 2, 3, 1, 4).flatten(2).flatten(0, 1)
        return values
