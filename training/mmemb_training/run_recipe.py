"""The method on real data: a recipe's stages, one after the other, in one folder; what is finished is not run again.

    start/                the public model with mmemb's markers
    pool/  selection/     candidates, and what the evaluator found of each
    joint/checkpoint      what was kept, learnt
    control/checkpoint    adaptive control: the model to export

Under torchrun, all processes share every stage: the questions of the pool and of the selection, the steps of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console

from mmemb_deploy.errors import BackendError, OptionError
from mmemb_deploy.files import claim
from mmemb_deploy.inputs.preprocess import Ints
from mmemb_deploy.inputs.prompts import DISC_EMB
from mmemb_deploy.progress import counting
from mmemb_training.checkpoint import FACTS, Checkpoint, load_checkpoint, outline_checkpoint
from mmemb_training.control.carried import Carried
from mmemb_training.control.grpo import train_control
from mmemb_training.control.publish import check_served, client_of, serve_command
from mmemb_training.data.table import SampleTable
from mmemb_training.joint import Lesson, lesson_of
from mmemb_training.micro_batches import machine_here, with_micro_batches
from mmemb_training.pool.build import Rationale, build_pool, print_report, read_pool
from mmemb_training.pool.endpoint import EndpointWorker
from mmemb_training.pool.local import TransformersWorker
from mmemb_training.pool.workers import Worker
from mmemb_training.prepare import prepare
from mmemb_training.processes import Processes
from mmemb_training.recipes.settings import RunRecipe, TrainedWeights, WorkerSettings
from mmemb_training.recipes.shapes import read_shape
from mmemb_training.samples import Lazy, Sample, held_apart
from mmemb_training.selection.assess import REPORT, assess_pool, read_assessed
from mmemb_training.selection.bank import TargetBank
from mmemb_training.selection.evaluators import EmbedderEvaluator, Evaluator, JudgeEvaluator
from mmemb_training.selection.mining import mine_negatives
from mmemb_training.selection.select import KeptRationales, Verdict, kept_rationales
from mmemb_training.stage import Metrics, Watch, run_stage, sharding
from mmemb_training.task_batches import TaskBatches
from mmemb_training.trainer import train_jointly

STAGES = ("pool", "selection", "joint", "control")
PATIENCE = timedelta(days=14)  # that processes wait for each other: one may have had the longer answers to write


def accelerator_of(weights: TrainedWeights) -> Accelerator:
    """Return an accelerator: FSDP2 where all weights train on several GPUs, DDP where adapters do."""
    sharded = int(torch.cuda.device_count()) > 1 and weights.adapters is None
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if weights.precision == "bf16" else "no",
        fsdp_plugin=sharding(weights.precision) if sharded else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


class Run:
    """A recipe's stages on some samples, in a folder."""

    def __init__(self, recipe: RunRecipe, samples: SampleTable, folder: Path, watch: Watch, console: Console) -> None:
        self.recipe = recipe
        self.samples = samples
        apart_N = held_apart(samples.question_keys(), samples.task_N, recipe.pool.held_apart)
        self._taught_N, self._apart_N = np.flatnonzero(~apart_N), np.flatnonzero(apart_N)
        self.folder = folder
        self._watch = watch
        self._console = console
        next_to_train = "control" if (folder / "joint" / "checkpoint" / FACTS).exists() else "joint"
        self._accelerator = accelerator_of(recipe.weights_of(next_to_train))
        self._processes = Processes(
            int(self._accelerator.process_index),
            int(self._accelerator.num_processes),
            self._accelerator.wait_for_everyone,
        )

    def upto(self, stage: str) -> None:
        """Run the stages up to and including `stage`. Raises OptionError before the first if one that trains cannot."""
        names = STAGES[: STAGES.index(stage) + 1]
        processes = self._accelerator.num_processes
        if "control" in names:
            self.recipe.check_control(processes)
            if self._accelerator.distributed_type == DistributedType.FSDP:
                raise OptionError(
                    "joint shards all weights and control trains adapters beside whole ones, which one start cannot "
                    "both: add --upto joint, and then run the same command without it"
                )
            if self.recipe.control.rollouts is not None:
                client_of(self.recipe.control.rollouts)  # a wrong address or a missing key shows before hours of work
        if "selection" in names:
            self._check_evaluator()
        training = [name for name in names if name in ("joint", "control")]
        if training:
            shape = read_shape(self._started())
            here = machine_here(processes)
            self.recipe = with_micro_batches(self.recipe, shape, here, training, self._console.print)
        steps = {"pool": self.pool, "selection": self.selection, "joint": self.joint, "control": self.control}
        for name in names:
            self._console.rule(name)
            steps[name]()

    def _check_evaluator(self) -> None:
        """Raise OptionError for an embedder that has never been taught to embed: where the markers are new."""
        if self.recipe.selection.evaluator == "judge":
            return
        if DISC_EMB in outline_checkpoint(self._started()).facts.provenance["added"]:
            raise OptionError(
                f"selection.evaluator is 'embedder', and {self.recipe.model.source} has no trained {DISC_EMB}: nothing "
                "of its embeddings means anything yet. Set it to 'judge', or start from a checkpoint of stage 3"
            )

    def start(self) -> Checkpoint:
        """Return the checkpoint that training starts from."""
        half = self.recipe.weights.adapters is not None
        return load_checkpoint(self._started(), dtype=self._held(frozen=half))

    def _held(self, *, frozen: bool) -> str:
        """Return the type of weights in memory: what trains is float32, and what is frozen as it is computed with."""
        return "bfloat16" if frozen and self.recipe.weights.precision == "bf16" else "float32"

    def pool(self) -> None:
        """Stage 1."""
        questions = Lazy(len(self._taught_N), lambda index: self.samples[int(self._taught_N[index])].question)
        workers = [self._worker(one) for one in self.recipe.pool.workers]
        own = len(self._processes.share(questions)) * len(workers)
        with counting(own, shown=self._processes.main, label="writing") as done:
            report = build_pool(questions, workers, self.folder / "pool", processes=self._processes, done=done)
        if self._processes.main:
            print_report(self._console, report)

    def selection(self) -> dict[str, KeptRationales]:
        """Stage 2: return what every question kept. A question that no worker wrote for is not among them."""
        recipe, folder = self.recipe.selection, self.folder / "selection"
        finished = (folder / REPORT).exists()
        evaluator = {
            "kind": recipe.evaluator,
            "source": self.recipe.model.source,
            "temperature": recipe.temperature,
            "hard_negatives": recipe.hard_negatives,
        }
        if self._accelerator.is_main_process:
            more = {"other_rationales": recipe.other_rationales, "against_negatives": recipe.margins.against_negatives}
            claim(folder, {"evaluator": evaluator} | more, begun=None if finished else False)
        self._accelerator.wait_for_everyone()
        if not finished:
            model = load_checkpoint(self._started(), dtype=self._held(frozen=True))
            model.model.to(self._accelerator.device)
            samples, loaded = self._evaluator(model)
            own = {sample.question.key for sample in self._processes.share(self._some(self._taught_N))}
            with counting(len(own), shown=self._processes.main, label="assessing") as done:
                assess_pool(
                    samples,
                    self._within_limit(read_pool(self.folder / "pool", own), model),
                    loaded,
                    folder,
                    recipe.margins,
                    other_rationales=recipe.other_rationales,
                    identity=evaluator,
                    processes=self._processes,
                    done=done,
                )
            self._accelerator.wait_for_everyone()
            if self._processes.main:
                self._console.print_json((folder / REPORT).read_text())
        return kept_rationales(
            read_assessed(folder),
            lambda one: one.verdict(recipe.margins) is Verdict.KEPT,
            temperature=recipe.sampling_temperature,
            unhelped=recipe.unhelped,
        )

    def joint(self) -> Checkpoint:
        """Stage 3."""
        return self._stage("joint", self._begin_joint)

    def _begin_joint(self) -> tuple[Checkpoint, Metrics, int]:
        recipe, start, kept = self.recipe.joint, self.start(), self.selection()
        known_K = np.array([index for index, key in enumerate(self.samples.question_keys()) if key in kept], np.int64)
        batches = TaskBatches(self.samples.task_N[known_K], recipe.batch, seed=recipe.schedule.seed)
        recipe = replace(recipe, schedule=recipe.schedule.over(batches.per_pass))

        def draw(step: int) -> Sequence[Lesson]:
            places = known_K[batches(step)].tolist()

            def lesson(index: int) -> Lesson:
                sample = self.samples[places[index]]
                rng = np.random.default_rng([recipe.schedule.seed, step, index])
                return lesson_of(sample, kept[sample.question.key], rng)

            return Lazy(len(places), lesson)

        steps = train_jointly(
            start,
            draw,
            recipe,
            self.folder / "joint",
            weights=self.recipe.weights_of("joint"),
            data={"samples": len(self._taught_N), "kept": len(kept)},
            accelerator=self._accelerator,
        )
        return start, steps, recipe.schedule.length

    def control(self) -> Checkpoint:
        """Stage 4, on as many of the questions that are held apart as its steps see."""
        return self._stage("control", self._begin_control)

    def _begin_control(self) -> tuple[Checkpoint, Metrics, int]:
        recipe, rng = self.recipe.control, np.random.default_rng(0)
        processes = int(self._accelerator.num_processes)  # accelerate types it as what never returns
        questions = self._carried(self._some(self._apart_N) if len(self._apart_N) else self.samples)
        wanted = min(len(questions), recipe.queries * math.ceil(recipe.schedule.length / recipe.updates))
        chosen = [questions[index] for index in rng.choice(len(questions), size=wanted, replace=False)]
        share = min(recipe.queries, wanted) // processes  # as many for each, so that all read as often
        if not share:
            raise OptionError(
                f"control.queries is {recipe.queries}, of {len(questions)} questions: each of {processes} processes "
                "needs at least 1"
            )
        joint = self.joint()
        self._check_server()
        joint.model.to(self._accelerator.device)
        samples, bank = self._mined(chosen, joint, self.folder / "control")

        def draw(turn: int) -> list[Sample]:
            drawn = np.random.default_rng([1, turn]).choice(len(samples), size=share * processes, replace=False)
            return [samples[index] for index in drawn[self._accelerator.process_index :: processes]]

        steps = train_control(
            joint,
            draw,
            recipe,
            self.folder / "control",
            bank=bank,
            weights=self.recipe.weights_of("control"),
            data={"samples": wanted},
            accelerator=self._accelerator,
        )
        return joint, steps, recipe.schedule.length

    def _check_server(self) -> None:
        """Raise BackendError, with the command that starts it, where the recipe's server of rollouts is not there."""
        settings = self.recipe.control.rollouts
        if settings is None:
            return
        adapters = self.recipe.weights_of("control").adapters
        command = serve_command(self.folder / "joint" / "checkpoint", settings.model, adapters)
        try:
            check_served(client_of(settings))
        except BackendError as error:
            raise BackendError(f"{error}. Serve what stage 3 left: {command}") from error

    def _carried(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Return the samples whose questions a server of rollouts reads as we do, and say how many it does not."""
        if self.recipe.control.rollouts is None:
            return samples
        carries = Carried(outline_checkpoint(self._started()).rows.prompt)
        found = [sample for sample in samples if carries(sample.question)]
        self._console.print(
            f"{len(samples) - len(found)} of {len(samples)} questions are left out, whose words a chat cannot carry"
        )
        return found

    def _some(self, index_N: Ints) -> Sequence[Sample]:
        """Return some of the samples, each made when it is asked for."""
        return Lazy(len(index_N), lambda index: self.samples[int(index_N[index])])

    def _started(self) -> Path:
        """Return the folder of the checkpoint that training starts from, made if need be."""
        target, model = self.folder / "start", self.recipe.model
        asked: Any = {
            "source": model.source,
            "dims": self.recipe.joint.objective.dims,
            "max_rationale_tokens": model.max_rationale_tokens,
            "max_pixels": model.max_pixels,
            "video_max_pixels": model.video_frames * model.video_max_pixels,
        }
        with self._accelerator.main_process_first():
            finished = (target / FACTS).exists()
            if self._accelerator.is_main_process:
                claim(self.folder, asked, begun=None if finished else False)
            if not finished:
                prepare(folder=target, **asked)
        return target

    def _stage(self, name: str, begin: Callable[[], tuple[Checkpoint, Metrics, int]]) -> Checkpoint:
        settings: Any = getattr(self.recipe, name)
        asked = {
            "recipe": asdict(replace(settings, micro_batch=None, **({"rollouts": None} if name == "control" else {}))),
            "selection": asdict(self.recipe.selection),
            "weights": asdict(replace(self.recipe.weights, gradient_checkpointing=False)),  # saves memory alone
        }
        return run_stage(
            self.folder / name,
            begin,
            self._watch,
            self._accelerator,
            asked,
            {"recipe": asdict(self.recipe)},
            dtype=self._held(frozen=self.recipe.weights_of("control").adapters is not None),
        )

    def _worker(self, settings: WorkerSettings) -> Worker:
        pool = self.recipe.pool
        asked: Any = {"samples": pool.samples, "temperature": pool.temperature, "max_tokens": pool.max_tokens}
        if settings.base_url is None:
            return TransformersWorker(settings.name, settings.model, device=str(self._accelerator.device), **asked)
        return EndpointWorker(
            settings.name,
            base_url=settings.base_url,
            model=settings.model,
            api_key_variable=settings.api_key_variable,
            **asked,
        )

    def _within_limit(self, pool: dict[str, list[Rationale]], model: Checkpoint) -> dict[str, list[Rationale]]:
        """Return the rationales that are no longer than those that the runtime writes, and say how many are."""
        limit, tokenize = model.facts.max_rationale_tokens, model.rows.prompt.tokenize
        kept = {key: [one for one in found if len(tokenize(one.text)) <= limit] for key, found in pool.items()}
        before, after = (sum(map(len, found.values())) for found in (pool, kept))
        if self._processes.main:
            self._console.print(f"{before - after} of {before} rationales have more than {limit} tokens: left out")
        return kept

    def _evaluator(self, model: Checkpoint) -> tuple[Sequence[Sample], Evaluator]:
        """Return the frozen evaluator, and the samples as it judges them: the embedder mines its hard negatives."""
        recipe, taught = self.recipe.selection, self._some(self._taught_N)
        if recipe.evaluator == "judge":
            return taught, JudgeEvaluator(model)
        samples, bank = self._mined(taught, model, self.folder / "selection")
        return samples, EmbedderEvaluator(model, bank, temperature=recipe.temperature)

    def _mined(self, samples: Sequence[Sample], model: Checkpoint, folder: Path) -> tuple[Sequence[Sample], TargetBank]:
        """Return samples with hard negatives and what they were mined from, whose embeddings lie in `folder`.

        As many negatives are drawn evenly: where all hard ones look right, some remain.
        """
        count = self.recipe.selection.hard_negatives
        targets, queries = folder / "targets.npy", folder / "queries.npy"
        bank = TargetBank(samples, model, targets, self._processes)
        mined = mine_negatives(
            samples, bank, model, hard=count, even=max(1, count), store=queries, processes=self._processes
        )
        return mined, bank
