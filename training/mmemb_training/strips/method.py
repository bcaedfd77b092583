"""The method on strips, stage by stage, in a folder that a later call goes on with.

    backbone/checkpoint      reads digits, and takes a rationale at its word; also the frozen evaluator
    pool/ selection/         candidates of three workers, and what the evaluator found of each
    seed-0/joint...          stage 3, by rule of selection, on what a noisy judge makes of it
    seed-0/control...        stage 4, and a round of rejection sampling in its place

Backbone and pool are shared by all seeds; the judge's noise and both stages are of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from mmemb_deploy.files import write_whole
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.control.grpo import train_control
from mmemb_training.control.rewards import score_group
from mmemb_training.control.rollouts import draw_groups
from mmemb_training.joint import Lesson, lesson_of
from mmemb_training.pool.build import build_pool, read_pool
from mmemb_training.recipes.settings import (
    ControlRecipe,
    Groups,
    JointRecipe,
    Margins,
    Objective,
    Rewards,
    Schedule,
    Unhelped,
)
from mmemb_training.samples import Sample
from mmemb_training.selection.assess import REPORT, assess_pool, read_assessed
from mmemb_training.selection.bank import TargetBank
from mmemb_training.selection.evaluators import EmbedderEvaluator
from mmemb_training.selection.mining import mine_negatives
from mmemb_training.selection.select import Assessed, Keeps, KeptRationales, Verdict, kept_rationales
from mmemb_training.stage import Metrics, Watch, plain_accelerator, run_stage
from mmemb_training.strips.judge import noisy
from mmemb_training.strips.model import DIMS, MAX_RATIONALE_TOKENS, strips_checkpoint
from mmemb_training.strips.questions import Strips, draw_strips
from mmemb_training.strips.workers import ASPECTS, empty, states_only_truths, strip_workers, write
from mmemb_training.task_batches import shuffled
from mmemb_training.trainer import train_jointly

STYLES = {"right": 0.6, "empty": 0.2, "off the aspect": 0.2}  # shares of the backbone's rationales
POOL_SEED, CONTROL_SEED = 1_000_000, 2_000_000  # apart from the backbone's draws, and from each other
NEGATIVES = 12  # of each kind, hard and drawn evenly
MARGINS = Margins(gain=2.0, content=1.0)  # two standard deviations of what the judge errs by
UNHELPED: Unhelped = "undecided"
SAMPLING_TEMPERATURE = 4.0  # nats of gain
RULES = "gain and content", "gain only", "instance-level correctness", "none (all candidates)"
AT_ONCE = 100  # questions whose rollouts are drawn together


@dataclass(frozen=True, kw_only=True)
class StripsRecipe:
    """The sizes of a run, and the dials of its control."""

    backbone_steps: int = 4000
    pool: int = 3000  # questions of stage 3
    control_pool: int = 2000  # questions of stage 4, which stage 3 never saw
    joint_steps: int = 300
    control_steps: int = 240
    batch: int = 64  # questions of a step of stages 0 and 3
    control_questions: int = 16  # of each batch of rollouts
    rollouts: int = 8  # of each of them

    def scaled(self, share: float) -> StripsRecipe:
        """Return the recipe with a share of its steps and questions."""
        names = ("backbone_steps", "pool", "control_pool", "joint_steps", "control_steps")
        return replace(self, **{name: max(2, round(share * getattr(self, name))) for name in names})

    def backbone(self) -> JointRecipe:
        """Return the recipe of stage 0: it learns to read rationales, and to write them as it is told."""
        return JointRecipe(
            schedule=Schedule(steps=self.backbone_steps, learning_rate=2e-3, save_every=100),
            objective=Objective(lambda_g=2.0, lambda_d=1.0, dims=DIMS, teach_decision=False),
            batch=self.batch,
            length_groups=3,
        )

    def joint(self, seed: int, *, steps: int | None = None) -> JointRecipe:
        """Return the recipe of stage 3; other `steps` for a later round."""
        return JointRecipe(
            schedule=Schedule(seed=seed, steps=steps or self.joint_steps, learning_rate=1e-3, warmup=20),
            objective=Objective(lambda_g=2.0, lambda_d=2.0, dims=DIMS),
            batch=self.batch,
            length_groups=3,
        )

    def control(self, seed: int, rewards: Rewards, groups: Groups) -> ControlRecipe:
        """Return the recipe of stage 4."""
        return ControlRecipe(
            schedule=Schedule(
                seed=seed, steps=self.control_steps, learning_rate=1e-4, warmup=10, weight_decay=0.0, spike=0
            ),
            rewards=rewards,
            queries=self.control_questions,
            group=self.rollouts,
            groups=groups,
        )


class Shared:
    """What all seeds start from: the backbone, and the pool as the evaluator found it."""

    def __init__(self, folder: Path, recipe: StripsRecipe, watch: Watch) -> None:
        self.folder = folder
        self.recipe = recipe
        self.watch = watch
        self.rendered = lru_cache(maxsize=2)(self._rendered)

    def backbone(self) -> Checkpoint:
        """Stage 0: what a pretrained backbone brings to the method. Loaded anew each time: training changes it."""
        recipe = self.recipe.backbone()

        def begin() -> tuple[Checkpoint, Metrics, int]:
            start = strips_checkpoint(0)
            steps = train_jointly(start, self._told, recipe, self.folder / "backbone", data={"styles": STYLES})
            return start, steps, self.recipe.backbone_steps

        return self.stage("backbone", begin, asdict(recipe))

    @cached_property
    def assessed(self) -> list[Assessed]:
        """Stages 1 and 2: every rationale of the pool, as the backbone sees it."""
        folder = self.folder / "selection"
        if (folder / REPORT).exists():
            return list(read_assessed(folder))
        backbone = self.backbone()
        samples, bank = self.mined("pool", backbone)
        workers = strip_workers(self.rendered("pool", 0).told, POOL_SEED)
        questions = [sample.question for sample in samples]
        build_pool(questions, workers, self.folder / "pool", batch=len(questions))
        evaluator = EmbedderEvaluator(backbone, bank, temperature=0.02)
        return list(assess_pool(samples, read_pool(self.folder / "pool"), evaluator, folder, MARGINS))

    def mined(self, part: str, checkpoint: Checkpoint) -> tuple[Sequence[Sample], TargetBank]:
        """Return the questions of "pool" or "control" with hard negatives, and the bank of both; labels are exact."""
        samples = self.rendered(part, 0).samples
        bank = TargetBank(samples, checkpoint)
        mined = mine_negatives(samples, bank, checkpoint, hard=NEGATIVES, even=NEGATIVES, share_of_positive=None)
        return mined, bank

    def batch(self, part: str, seed: int, number: int, size: int) -> list[Sample]:
        """Return one batch of "pool" or "control"; every pass is in another order and rendering."""
        passes, places = shuffled(len(self.rendered(part, 0).samples), size, number, seed)
        shown = self.rendered(part, passes).samples
        return [shown[place] for place in places]

    def stage(self, name: str, begin: Callable[[], tuple[Checkpoint, Metrics, int]], asked: object) -> Checkpoint:
        """Run a stage in a folder of its name, or load what it made."""
        facts = {"recipe": asked}
        return run_stage(self.folder / name, begin, self.watch, plain_accelerator(), facts, facts)

    def _rendered(self, part: str, rendering: int) -> Strips:
        seed, count = {"pool": (POOL_SEED, self.recipe.pool), "control": (CONTROL_SEED, self.recipe.control_pool)}[part]
        return draw_strips("train", seed, count, rendering)

    def _told(self, step: int) -> list[Lesson]:
        """Return a step's lessons of stage 0: new strips, and rationales that are right, empty or off the aspect."""
        rng = np.random.default_rng(step)
        strips = draw_strips("train", int(rng.integers(2**31)), self.recipe.batch)
        styles = rng.choice(list(STYLES), size=self.recipe.batch, p=list(STYLES.values()))
        lessons = []
        for sample, style in zip(strips.samples, styles, strict=True):
            strip = strips.told[sample.question.key]
            others = [aspect for aspect in ASPECTS if aspect != strip.aspect]
            aspect = others[rng.integers(len(others))] if style == "off the aspect" else strip.aspect
            text = write(aspect, strip)
            lessons.append(Lesson(sample, empty(text) if style == "empty" else text))
        return lessons


@dataclass(frozen=True)
class OwnRationales:
    """Rationales that a model wrote, by question, and by how much each raised the score of its embedding."""

    texts: dict[str, list[str]]
    gaps: dict[str, list[float]]

    def kept(self, key: str) -> KeptRationales:
        """Return those that help, evenly; none where reasoning does not help on average."""
        gaps = self.gaps[key]
        texts = [text for text, gap in zip(self.texts[key], gaps, strict=True) if gap > 0]
        if not texts or np.mean(gaps) <= 0:
            return KeptRationales()
        return KeptRationales(tuple(texts), (1 / len(texts),) * len(texts))


class SeedRun:
    """Stages 3 and 4 of one seed."""

    def __init__(self, shared: Shared, seed: int) -> None:
        self.shared = shared
        self.seed = seed
        self.recipe = shared.recipe

    @cached_property
    def judged(self) -> list[Assessed]:
        """What this seed's judge makes of the pool."""
        return noisy(self.shared.assessed, self.seed)

    def keeps(self, rule: str) -> Keeps:
        """Return a rule of selection by its name."""
        told = self.shared.rendered("pool", 0).told
        keeps: dict[str, Keeps] = {
            "gain and content": lambda one: one.verdict(MARGINS) is Verdict.KEPT,
            "gain only": lambda one: one.gain > MARGINS.gain,
            "instance-level correctness": lambda one: states_only_truths(one.rationale.text, told[one.question]),
            "none (all candidates)": lambda _: True,
        }
        return keeps[rule]

    def joint(self, rule: str = RULES[0]) -> Checkpoint:
        """Stage 3, from the backbone, on what a rule keeps."""
        temperature = SAMPLING_TEMPERATURE if rule in RULES[:2] else float("inf")
        kept = kept_rationales(self.judged, self.keeps(rule), temperature=temperature, unhelped=UNHELPED)
        recipe = self.recipe.joint(self.seed)
        return self._joint(f"joint-{RULES.index(rule)}", rule, self.shared.backbone, "pool", kept, recipe)

    @cached_property
    def own(self) -> OwnRationales:
        """What stage 3's model writes for the questions of stage 4, as many as that draws, and what each is worth."""
        path = self.shared.folder / f"seed-{self.seed}" / "own.json"
        if not path.exists():
            start = self.joint()
            samples, bank = self.shared.mined("control", start)
            found = OwnRationales({}, {})
            for begin in range(0, len(samples), AT_ONCE):
                part = samples[begin : begin + AT_ONCE]
                groups = draw_groups(
                    start,
                    part,
                    size=self.recipe.rollouts,
                    kind="expected",
                    max_tokens=MAX_RATIONALE_TOKENS,
                    seed=(self.seed, begin),
                )
                for sample, group in zip(part, groups, strict=True):
                    scored = score_group(group, bank.candidates(sample), Rewards(), MAX_RATIONALE_TOKENS)
                    texts = [
                        start.rows.prompt.tokenizer.decode(one.token_ids) for one in group if one.token_ids is not None
                    ]
                    found.texts[sample.question.key] = texts
                    found.gaps[sample.question.key] = [float(gap) for gap in scored.gap_G if not np.isnan(gap)]
            write_whole(path, json.dumps(asdict(found)))
        return OwnRationales(**json.loads(path.read_text()))

    def rejection(self) -> Checkpoint:
        """A round of rejection sampling after stage 3: of its own rationales those are learnt that help.

        It has the questions and the rollouts of stage 4, and as many steps.
        """
        kept = {key: self.own.kept(key) for key in self.own.texts}
        recipe = self.recipe.joint(self.seed, steps=self.recipe.control_steps)
        return self._joint("rejection", "own rationales that help", self.joint, "control", kept, recipe)

    def control(self, rewards: Rewards, groups: Groups = "paired") -> Checkpoint:
        """Stage 4, from what stage 3 left."""
        recipe = self.recipe.control(self.seed, rewards, groups)
        name = f"seed-{self.seed}/control-{groups}-{rewards.cost}-{rewards.sigma}"

        def begin() -> tuple[Checkpoint, Metrics, int]:
            start = self.joint()
            samples, bank = self.shared.mined("control", start)
            negatives = {sample.question.key: sample.negatives for sample in samples}

            def draw(turn: int) -> list[Sample]:
                batch = self.shared.batch("control", self.seed, turn, recipe.queries)
                return [replace(sample, negatives=negatives[sample.question.key]) for sample in batch]

            folder = self.shared.folder / name
            steps = train_control(start, draw, recipe, folder, bank=bank)
            return start, steps, self.recipe.control_steps

        return self.shared.stage(name, begin, asdict(recipe))

    def _joint(
        self,
        name: str,
        rule: str,
        start: Callable[[], Checkpoint],
        part: str,
        kept: Mapping[str, KeptRationales],
        recipe: JointRecipe,
    ) -> Checkpoint:
        folder = f"seed-{self.seed}/{name}"

        def draw(step: int) -> list[Lesson]:
            rng = np.random.default_rng([self.seed, step])
            batch = self.shared.batch(part, self.seed, step, recipe.batch)
            return [lesson_of(sample, kept[sample.question.key], rng) for sample in batch]

        def begin() -> tuple[Checkpoint, Metrics, int]:
            model = start()
            steps = train_jointly(model, draw, recipe, self.shared.folder / folder, data={"rule": rule})
            return model, steps, recipe.schedule.length

        return self.shared.stage(folder, begin, asdict(recipe) | {"rule": rule})
