"""The full method on DigitChain, stage by stage: backbone, pool, selection, joint training, adaptive control.

A run's folder holds one folder per stage; a stage that is finished is loaded, one that is not goes on.

    backbone/checkpoint   reads digits and takes a rationale at its word; also the frozen evaluator
    pool/                 candidates of four workers
    selection/            what the evaluator found of each candidate
    joint/checkpoint      contrastive and generative training on what was kept
    control/checkpoint    adaptive control: the model to export
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mmemb_training.checkpoint import Checkpoint
from mmemb_training.control.grpo import train_control
from mmemb_training.joint import Lesson, lesson_of
from mmemb_training.nano.digits import RULES, digit_workers, draw_digits, states_only_truths
from mmemb_training.nano.model import DIMS, nano_checkpoint
from mmemb_training.pool.build import Rationale, build_pool, read_pool
from mmemb_training.recipes.settings import ControlRecipe, Groups, JointRecipe, Margins, Objective, Rewards, Schedule
from mmemb_training.samples import Sample
from mmemb_training.selection.assess import REPORT, assess_pool, read_assessed
from mmemb_training.selection.bank import TargetBank
from mmemb_training.selection.evaluators import EmbedderEvaluator
from mmemb_training.selection.mining import mine_negatives
from mmemb_training.selection.select import Assessed, Keeps, Verdict, kept_rationales
from mmemb_training.stage import Metrics, Watch, plain_accelerator, run_stage
from mmemb_training.task_batches import shuffled
from mmemb_training.trainer import train_jointly

POOL_SEED = 1_000_000  # apart from the backbone's draws
STYLES = {"exact": 0.5, "verbose": 0.25, "hollow": 0.25}  # shares of the backbone's rationales
NEGATIVES = 12  # of each kind, hard and drawn evenly
MARGINS = Margins()
SAMPLING_TEMPERATURE = 4.0  # nats of gain


@dataclass(frozen=True, kw_only=True)
class NanoRecipe:
    """The sizes of a run. The defaults make the embedded bundle in about 45 minutes on 2 cores."""

    seed: int = 0
    backbone_steps: int = 2000
    pool: int = 6000  # questions
    joint_steps: int = 500
    control_steps: int = 320
    batch: int = 96  # questions of a step of stages 0 and 3
    control_questions: int = 16  # of each batch of rollouts

    def scaled(self, share: float) -> NanoRecipe:
        """Return the recipe with a share of its steps and questions."""
        names = ("backbone_steps", "pool", "joint_steps", "control_steps")
        return replace(self, **{name: max(2, round(share * getattr(self, name))) for name in names})

    def backbone(self) -> JointRecipe:
        """Return the recipe of stage 0. The next-token loss is a mean per token, and small beside InfoNCE."""
        return JointRecipe(
            schedule=Schedule(seed=self.seed, steps=self.backbone_steps, learning_rate=2e-3),
            objective=Objective(lambda_g=2.0, lambda_d=1.0, dims=DIMS, teach_decision=False),
            batch=self.batch,
            length_groups=4,
        )

    def joint(self) -> JointRecipe:
        """Return the recipe of stage 3.

        Most queries keep no rationale, and learn by their direct embedding alone: it weighs double.
        """
        return JointRecipe(
            schedule=Schedule(seed=self.seed, steps=self.joint_steps, learning_rate=7e-4, warmup=20),
            objective=Objective(lambda_g=2.0, lambda_d=2.0, dims=DIMS),
            batch=self.batch,
            length_groups=4,
        )

    def control(self, rewards: Rewards, *, groups: Groups = "paired") -> ControlRecipe:
        """Return the recipe of stage 4."""
        schedule = Schedule(
            seed=self.seed, steps=self.control_steps, learning_rate=1e-4, warmup=10, weight_decay=0.0, spike=0
        )
        return ControlRecipe(schedule=schedule, rewards=rewards, queries=self.control_questions, groups=groups)


def pair_aware(one: Assessed) -> bool:
    """Keep what helps its pair by what it says: the method's rule."""
    return one.verdict(MARGINS) is Verdict.KEPT


def gain_only(one: Assessed) -> bool:
    """Keep what helps its pair, whatever it says."""
    return one.gain > MARGINS.gain


def instance_level(one: Assessed) -> bool:
    """Keep what is right in itself, whatever it does for the pair."""
    return states_only_truths(one.rationale.text)


def everything(_: Assessed) -> bool:
    """Keep all candidates."""
    return True


class NanoRun:
    """One run of the method in a folder; `watch` runs a stage's steps and shows them."""

    def __init__(self, folder: Path, recipe: NanoRecipe, watch: Watch) -> None:
        self.folder = folder
        self.recipe = recipe
        self._watch = watch
        self._rendered = lru_cache(maxsize=1)(partial(draw_digits, "train", POOL_SEED + recipe.seed, recipe.pool))
        self.digits = self._rendered(0)

    def full(self) -> Path:
        """Run all stages; return the folder of the final checkpoint."""
        self.control("control", self.joint("joint", pair_aware), self.recipe.control(Rewards()))
        return self.folder / "control" / "checkpoint"

    def backbone(self) -> Checkpoint:
        """Stage 0: what a pretrained backbone brings to the method, learnt on DigitChain.

        MMEmb-R1 starts from a Qwen3-VL that reads images, calculates, and takes a rationale at its word. Nobody ships
        one of 1.5M parameters, so this stage makes it: contrastive on both embeddings, and next-token loss on
        rationales that are never wrong, in three styles. It decides nothing yet.
        """
        recipe = self.recipe.backbone()

        def draw(step: int) -> list[Lesson]:
            rng = np.random.default_rng([self.recipe.seed, step])
            digits = draw_digits("train", int(rng.integers(2**31)), recipe.batch)
            styles = rng.choice(list(STYLES), size=recipe.batch, p=list(STYLES.values()))
            return [
                Lesson(sample, RULES[style](*digits.told[sample.question.key]))
                for sample, style in zip(digits.samples, styles, strict=True)
            ]

        def begin() -> tuple[Checkpoint, Metrics, int]:
            start = nano_checkpoint(self.recipe.seed)
            steps = train_jointly(start, draw, recipe, self.folder / "backbone", data={"styles": STYLES})
            return start, steps, self.recipe.backbone_steps

        return self._stage("backbone", begin)

    def selection(self) -> list[Assessed]:
        """Stages 1 and 2: every rationale of the pool, assessed by the backbone."""
        folder = self.folder / "selection"
        if (folder / REPORT).exists():
            return list(read_assessed(folder))
        backbone = self.backbone()
        samples, bank = self.mined(backbone)
        evaluator = EmbedderEvaluator(backbone, bank, temperature=0.02)
        return list(assess_pool(samples, self._pool(), evaluator, folder, MARGINS, seed=self.recipe.seed))

    def mined(self, checkpoint: Checkpoint) -> tuple[Sequence[Sample], TargetBank]:
        """Return the pool's samples with hard negatives, and the bank they come from; labels are exact."""
        samples = self.digits.samples
        bank = TargetBank(samples, checkpoint)
        mined = mine_negatives(
            samples, bank, checkpoint, hard=NEGATIVES, even=NEGATIVES, share_of_positive=None, seed=self.recipe.seed
        )
        return mined, bank

    def joint(self, name: str, keeps: Keeps) -> Checkpoint:
        """Stage 3, from the backbone, on the candidates that `keeps` keeps."""
        recipe = self.recipe.joint()

        def begin() -> tuple[Checkpoint, Metrics, int]:
            temperature = SAMPLING_TEMPERATURE if keeps in (pair_aware, gain_only) else float("inf")
            kept = kept_rationales(self.selection(), keeps, temperature=temperature, unhelped="stop")

            def draw(step: int) -> list[Lesson]:
                rng = np.random.default_rng([self.recipe.seed, step])
                batch = self._batch(step, recipe.batch)
                return [lesson_of(sample, kept[sample.question.key], rng) for sample in batch]

            start = self.backbone()
            steps = train_jointly(start, draw, recipe, self.folder / name, data={"rule": keeps.__name__})
            return start, steps, self.recipe.joint_steps

        return self._stage(name, begin)

    def control(self, name: str, start: Checkpoint, recipe: ControlRecipe) -> Checkpoint:
        """Stage 4, from what stage 3 left."""

        def begin() -> tuple[Checkpoint, Metrics, int]:
            samples, bank = self.mined(start)
            negatives = {sample.question.key: sample.negatives for sample in samples}

            def draw(turn: int) -> list[Sample]:
                return [
                    replace(sample, negatives=negatives[sample.question.key])
                    for sample in self._batch(turn, recipe.queries)
                ]

            steps = train_control(start, draw, recipe, self.folder / name, bank=bank)
            return start, steps, self.recipe.control_steps

        return self._stage(name, begin)

    def _batch(self, number: int, size: int) -> list[Sample]:
        """Return one batch of the pool's samples; every pass over the pool is in another order and rendering."""
        passes, places = shuffled(len(self.digits.samples), size, number, self.recipe.seed)
        shown = self._rendered(passes).samples
        return [shown[place] for place in places]

    def _pool(self) -> Mapping[str, Sequence[Rationale]]:
        questions = [sample.question for sample in self.digits.samples]
        build_pool(questions, digit_workers(self.digits), self.folder / "pool", batch=len(questions))
        return read_pool(self.folder / "pool")

    def _stage(self, name: str, begin: Callable[[], tuple[Checkpoint, Metrics, int]]) -> Checkpoint:
        asked = {"recipe": asdict(self.recipe)}
        return run_stage(self.folder / name, begin, self._watch, plain_accelerator(), asked, asked)
