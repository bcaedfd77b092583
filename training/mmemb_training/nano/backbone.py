"""The nano model's stage 0: what a pretrained backbone brings to the method, learnt on DigitChain.

MMEmb-R1 starts from a Qwen3-VL that reads images, calculates, and takes a rationale at its word. Nobody ships one of
1.5M parameters, so this stage makes it: contrastive on both embeddings, and next-token loss on rationales that are
never wrong, in three styles. It decides nothing yet. Its result is the frozen evaluator of selection, and where every
joint training starts from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmemb_training.checkpoint import Checkpoint
from mmemb_training.joint import Lesson
from mmemb_training.nano.digits import RULES, draw_digits
from mmemb_training.nano.model import DIMS
from mmemb_training.recipes.settings import JointRecipe, Objective, Schedule
from mmemb_training.trainer import train_jointly

STYLES = {"exact": 0.5, "verbose": 0.25, "hollow": 0.25}  # shares of the rationales
BATCH = 96


def backbone_recipe(seed: int, steps: int) -> JointRecipe:
    """Return the recipe of stage 0. The next-token loss is per token, and small beside InfoNCE at this temperature."""
    return JointRecipe(
        schedule=Schedule(seed=seed, steps=steps, learning_rate=2e-3),
        objective=Objective(lambda_g=2.0, lambda_d=1.0, dims=DIMS, teach_decision=False),
        batch=BATCH,
        length_groups=4,
    )


def train_backbone(checkpoint: Checkpoint, seed: int, steps: int, folder: Path) -> Iterator[dict[str, float]]:
    """Train the random nano model in place, yielding metrics; every step draws new digits."""

    def draw(step: int) -> list[Lesson]:
        rng = np.random.default_rng([seed, step])
        digits = draw_digits("train", int(rng.integers(2**31)), BATCH)
        styles = rng.choice(list(STYLES), size=BATCH, p=list(STYLES.values()))
        return [
            Lesson(sample, RULES[style](*digits.told[sample.question.key]))
            for sample, style in zip(digits.samples, styles, strict=True)
        ]

    data = {"digits": "train", "batch": BATCH, "styles": STYLES}
    return train_jointly(checkpoint, draw, backbone_recipe(seed, steps), folder, data=data)
