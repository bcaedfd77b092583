"""The method on real data: a recipe's stages, one after the other, in one folder; what is finished is not run again.

    start/                the public model with mmemb's markers
    pool/  selection/     candidates, and what the evaluator found of each
    joint/checkpoint      what was kept, learnt
    control/checkpoint    adaptive control: the model to export

Under torchrun, the stages that train are shared by all processes; the pool and the selection are the main process's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import FullyShardedDataParallelPlugin
from rich.console import Console

from mmemb_deploy.errors import OptionError
from mmemb_deploy.progress import counting
from mmemb_training.batching import TaskBatches
from mmemb_training.checkpoint import FACTS, Checkpoint, load_checkpoint
from mmemb_training.control.grpo import ControlRecipe, train_control
from mmemb_training.control.rewards import Rewards
from mmemb_training.data.registry import read
from mmemb_training.joint import Lesson, Objective
from mmemb_training.loop import Schedule
from mmemb_training.lora import LoraSettings
from mmemb_training.plan.recipes import Recipe
from mmemb_training.plan.recipes import Worker as WorkerSettings
from mmemb_training.pool.endpoint import EndpointWorker
from mmemb_training.pool.job import build_pool, print_report, read_pool
from mmemb_training.pool.local import TransformersWorker
from mmemb_training.pool.workers import Worker
from mmemb_training.prepare import prepare
from mmemb_training.samples import Sample
from mmemb_training.selection.bank import TargetBank, mine_negatives
from mmemb_training.selection.evaluators import EmbedderEvaluator, Evaluator, JudgeEvaluator
from mmemb_training.selection.job import REPORT, judge_pool, read_judged
from mmemb_training.selection.select import Choice, Margins, Verdict, choose
from mmemb_training.stage import Metrics, Watch, finish_stage
from mmemb_training.trainer import JointRecipe, train_jointly

STAGES = ("pool", "selection", "joint", "control")
DEFAULT_MICRO_BATCH = 8  # prompts that a process reads at once, where the recipe leaves it open


def read_samples(data: Sequence[str], limit: int | None) -> list[Sample]:
    """Read "NAME=FOLDER" data sets, at most `limit` samples of each. Raises OptionError for anything else."""
    samples: list[Sample] = []
    for one in data:
        name, found, folder = one.partition("=")
        if not found:
            raise OptionError(f"data {one!r} is not NAME=FOLDER, such as mmeb/CIRR=downloads/MMEB-train")
        for place, sample in enumerate(read(name, Path(folder))):
            if place == limit:
                break
            samples.append(sample)
    if not samples:
        raise OptionError("data holds no sample: pass --data NAME=FOLDER")
    return samples


def accelerator_of(recipe: Recipe) -> Accelerator:
    """Return the accelerator of a recipe: FSDP2 where all weights train on several GPUs, DDP where adapters do."""
    precision = "bf16" if recipe.joint.precision == "bf16" else "no"
    several = int(torch.cuda.device_count()) > 1
    plugin = (
        FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3VLTextDecoderLayer"],
        )
        if several and recipe.model.method == "full"
        else None
    )
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        fsdp_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
    )


class Run:
    """A recipe's stages on some samples, in a folder."""

    def __init__(self, recipe: Recipe, samples: Sequence[Sample], folder: Path, watch: Watch, console: Console) -> None:
        self.recipe = recipe
        self.samples = samples
        self.folder = folder
        self._watch = watch
        self._console = console
        self._accelerator = accelerator_of(recipe)
        self._dtype = "bfloat16" if recipe.model.method == "lora" and recipe.joint.precision == "bf16" else "float32"

    def upto(self, stage: str) -> None:
        """Run the stages up to and including `stage`."""
        steps = {"pool": self.pool, "selection": self.selection, "joint": self.joint, "control": self.control}
        for name in STAGES[: STAGES.index(stage) + 1]:
            self._console.rule(name)
            steps[name]()

    def start(self) -> Checkpoint:
        """Return the checkpoint that training starts from."""
        target, joint = self.folder / "start", self.recipe.joint
        with self._accelerator.main_process_first():
            if not (target / FACTS).exists():
                prepare(
                    self.recipe.model.source,
                    target,
                    dims=joint.dims,
                    max_rationale_tokens=joint.max_rationale_tokens,
                    max_pixels=joint.max_pixels,
                    video_max_pixels=joint.video_frames * joint.video_max_pixels,
                )
        return load_checkpoint(target, dtype=self._dtype)

    def pool(self) -> None:
        """Stage 1."""
        if self._accelerator.is_main_process:
            questions = [sample.question for sample in self.samples]
            workers = [self._worker(one) for one in self.recipe.pool.workers]
            with counting(len(questions) * len(workers), shown=True, label="writing") as done:
                report = build_pool(questions, workers, self.folder / "pool", done=done)
            print_report(self._console, report)
        self._accelerator.wait_for_everyone()

    def selection(self) -> dict[str, Choice]:
        """Stage 2: return what every question kept. A question that no worker wrote for is not among them."""
        settings, folder = self.recipe.selection, self.folder / "selection"
        margins = Margins(settings.margin_gain, settings.margin_content)
        if self._accelerator.is_main_process and not (folder / REPORT).exists():
            model = self.start()
            model.model.to(self._accelerator.device)
            identity = {"kind": settings.evaluator, "source": self.recipe.model.source}
            samples, evaluator = self._evaluator(model)
            with counting(len(samples), shown=True, label="judging") as done:
                judge_pool(
                    samples,
                    read_pool(self.folder / "pool"),
                    evaluator,
                    folder,
                    margins,
                    foreign=settings.foreign,
                    identity=identity,
                    done=done,
                )
            self._console.print_json((folder / REPORT).read_text())
        self._accelerator.wait_for_everyone()
        return choose(
            read_judged(folder),
            lambda one: one.verdict(margins) is Verdict.KEPT,
            temperature=settings.sampling_temperature,
        )

    def joint(self) -> Checkpoint:
        """Stage 3."""
        settings, start = self.recipe.joint, self.start()
        choices = self.selection()
        known = [sample for sample in self.samples if sample.question.key in choices]
        batches = TaskBatches(known, settings.batch, seed=0)
        count = settings.steps or math.ceil((settings.epochs or 1) * batches.per_pass)

        def draw(step: int) -> list[Lesson]:
            rng = np.random.default_rng([0, step])
            return [Lesson(sample, choices[sample.question.key].draw(rng)) for sample in batches(step)]

        own = settings.batch // self._accelerator.num_processes
        chunks = math.ceil(own / (settings.micro_batch or DEFAULT_MICRO_BATCH))
        recipe = JointRecipe(
            schedule=Schedule(
                steps=count,
                learning_rate=settings.learning_rate,
                warmup=settings.warmup,
                weight_decay=settings.weight_decay,
            ),
            objective=Objective(
                temperature=settings.temperature,
                lambda_g=settings.lambda_g,
                lambda_d=settings.lambda_d,
                dims=settings.dims,
            ),
            query_chunks=chunks,
            target_chunks=chunks,
            grad_cache=chunks > 1,
            gradient_checkpointing=settings.gradient_checkpointing,
            lora=self._lora(),
        )
        data = {"samples": len(self.samples), "choices": len(choices)}
        steps = train_jointly(start, draw, recipe, self.folder / "joint", data=data, accelerator=self._accelerator)
        return self._finish("joint", start, steps, count)

    def control(self) -> Checkpoint:
        """Stage 4, on as many questions as its steps see. Groups are decoded here: sharded weights cannot be."""
        settings, joint = self.recipe.control, self.joint()
        if self.recipe.model.method == "full" and torch.cuda.device_count() > 1:
            raise OptionError(
                "control with model.method 'full' decodes with whole weights: run it on one GPU, or pass served "
                "rollouts to train_control"
            )
        rewards = Rewards(
            cost=settings.cost,
            sigma=settings.sigma,
            well_formed=settings.well_formed,
            embedding=settings.embedding,
            temperature=self.recipe.joint.temperature,
        )
        recipe = ControlRecipe(
            schedule=Schedule(
                steps=settings.steps,
                learning_rate=settings.learning_rate,
                weight_decay=0.0,
                spike=None,
                warmup=10,
                save_every=50 * settings.updates,
            ),
            questions_at_once=self.recipe.joint.micro_batch or DEFAULT_MICRO_BATCH,
            lora=self._lora(),
            rewards=rewards,
            group=settings.group,
            updates=settings.updates,
            clip=settings.clip,
            beta=settings.beta,
            anchor=settings.anchor,
        )
        return self._finish("control", joint, self._control_steps(joint, recipe), settings.steps)

    def _control_steps(self, joint: Checkpoint, recipe: ControlRecipe) -> Metrics:
        settings, rng = self.recipe.control, np.random.default_rng(0)
        wanted = min(len(self.samples), settings.queries * math.ceil(settings.steps / settings.updates))
        chosen = [self.samples[place] for place in rng.choice(len(self.samples), size=wanted, replace=False)]
        joint.model.to(self._accelerator.device)
        samples = self._mined(chosen, joint)
        bank = TargetBank(samples, joint)
        size = min(settings.queries, len(samples))

        def draw(turn: int) -> list[Sample]:
            places = np.random.default_rng([1, turn]).choice(len(samples), size=size, replace=False)
            share = places[self._accelerator.process_index :: self._accelerator.num_processes]
            return [samples[place] for place in share]

        yield from train_control(
            joint,
            draw,
            recipe,
            self.folder / "control",
            bank=bank,
            data={"samples": wanted},
            accelerator=self._accelerator,
        )

    def _finish(self, name: str, checkpoint: Checkpoint, steps: Metrics, count: int) -> Checkpoint:
        provenance = {"recipe": json.loads(self.recipe.model_dump_json())}
        return finish_stage(
            self.folder / name, checkpoint, steps, count, self._watch, self._accelerator, provenance, dtype=self._dtype
        )

    def _worker(self, settings: WorkerSettings) -> Worker:
        pool = self.recipe.pool
        if settings.base_url is None:
            device = str(self._accelerator.device)
            return TransformersWorker(
                settings.name,
                settings.model,
                samples=pool.samples,
                temperature=pool.temperature,
                max_tokens=pool.max_tokens,
                device=device,
            )
        return EndpointWorker(
            settings.name,
            base_url=settings.base_url,
            model=settings.model,
            samples=pool.samples,
            temperature=pool.temperature,
            max_tokens=pool.max_tokens,
            api_key_variable=settings.api_key_variable,
        )

    def _evaluator(self, model: Checkpoint) -> tuple[Sequence[Sample], Evaluator]:
        """Return the frozen evaluator, and the samples as it judges them: the embedder mines its hard negatives."""
        settings = self.recipe.selection
        if settings.evaluator == "judge":
            return self.samples, JudgeEvaluator(model)
        samples = self._mined(self.samples, model)
        return samples, EmbedderEvaluator(model, TargetBank(samples, model), temperature=settings.temperature)

    def _mined(self, samples: Sequence[Sample], model: Checkpoint) -> list[Sample]:
        """Return samples with hard negatives, and as many drawn evenly: where all hard ones look right, some remain."""
        count = self.recipe.selection.hard_negatives
        return mine_negatives(samples, TargetBank(samples, model), model, hard=count, even=max(1, count))

    def _lora(self) -> LoraSettings | None:
        if self.recipe.model.method == "full":
            return None
        lora = self.recipe.model.lora
        return LoraSettings(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=tuple(lora.targets))
