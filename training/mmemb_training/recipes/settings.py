"""What a run can be told, section by section: a recipe file names these fields, and the stages take these values.

Nothing here imports torch, so that a recipe is checked, and its run estimated, where there is none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import ConfigDict

from mmemb_deploy.errors import OptionError, check_known

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import AdamW

Method = Literal["full", "lora"]
Unhelped = Literal["undecided", "stop"]
# Who reasons in a group of rollouts: as the policy draws; the same, but with a rollout of each kind, by force where
# there is none; or one stops and the others reason, and the decision's gradient is its expectation over both.
Groups = Literal["drawn", "paired", "expected"]
# A rollout's reward less its group's mean (Dr. GRPO, arXiv 2503.20783), or this over the group's spread (GRPO), which
# pushes as hard where rollouts differ by noise alone.
Advantage = Literal["centred", "standardised"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}


def check_bounds(settings: Any, *names: str, **limits: float) -> None:
    """Raise OptionError for a field that is not a finite number within limits, named in BOUNDS; None is no value."""
    for name in names:
        value = getattr(settings, name)
        if value is None or (
            math.isfinite(value) and all(BOUNDS[bound][1](value, limit) for bound, limit in limits.items())
        ):
            continue
        said = " and ".join(f"{BOUNDS[bound][0]} {limit:g}" for bound, limit in limits.items())
        raise OptionError(f"{name} is {value}: it must be {said}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the weights move: AdamW, linear warm-up, then a cosine to zero, over `steps` or over `epochs` of the data."""

    seed: int = 0
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float  # the highest
    warmup: int = 100  # steps
    weight_decay: float = 0.05  # of matrices
    betas: tuple[float, float] = (0.9, 0.98)
    gradient_norm: float = 1.0  # clipped to this
    spike: float = 20.0  # times the median of the recent losses stops the run; 0 never does, for losses around zero
    save_every: int = 200  # steps

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise OptionError(f"epochs is {self.epochs} and steps is {self.steps}: set exactly one of them")
        check_bounds(self, "steps", "save_every", least=1)
        check_bounds(self, "epochs", "learning_rate", "gradient_norm", above=0)
        check_bounds(self, "seed", "warmup", "weight_decay", "spike", least=0)

    def over(self, steps_per_epoch: int) -> Schedule:
        """Return the schedule in steps, where an epoch takes so many."""
        if self.epochs is None:
            return self
        return replace(self, steps=max(1, math.ceil(self.epochs * steps_per_epoch)), epochs=None)

    @property
    def length(self) -> int:
        """Its steps; a schedule in epochs has none until `over` counts them."""
        assert self.steps is not None
        return self.steps

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.length - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def optimizer(self, model: nn.Module) -> AdamW:
        """Return AdamW over the weights that take gradients; vectors and norms are not decayed."""
        from torch.optim import AdamW

        weights = [weight for weight in model.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        return AdamW([group for group in groups if group["params"]], lr=0.0, betas=self.betas)


@dataclass(frozen=True, kw_only=True)
class StartModel:
    """The public model that a run starts from, and how much it is shown and writes."""

    source: str  # hub id or folder
    max_pixels: int  # of an image
    planned_tokens: int  # of a prompt, visual tokens included: memory is planned for it; longer ones are read whole
    max_rationale_tokens: int
    video_frames: int
    video_max_pixels: int  # of a frame

    def __post_init__(self) -> None:
        check_bounds(self, "max_pixels", "max_rationale_tokens", "video_max_pixels", least=1)
        check_bounds(self, "planned_tokens", least=16)
        check_bounds(self, "video_frames", least=2)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters of a rank on the named projections of every text layer; their output is scaled by alpha / rank."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        check_bounds(self, "rank", "alpha", least=1)
        check_bounds(self, "dropout", least=0, below=1)
        if not self.targets:
            raise OptionError(f"targets is []: choose from {', '.join(PROJECTIONS)}")
        for target in self.targets:
            check_known("targets:", target, PROJECTIONS)


@dataclass(frozen=True, kw_only=True)
class TrainedWeights:
    """Which weights of a model train, and how it is held meanwhile."""

    method: Method = "full"
    lora: LoraSettings = field(default_factory=LoraSettings)  # read where `method` is "lora"
    precision: Literal["bf16", "fp32"] = "fp32"
    gradient_checkpointing: bool = False

    @property
    def adapters(self) -> LoraSettings | None:
        """The adapters that train; None where all weights do."""
        return self.lora if self.method == "lora" else None

    @property
    def value_bytes(self) -> int:
        """Bytes of a value that is computed with."""
        return 2 if self.precision == "bf16" else 4


ALL_WEIGHTS = TrainedWeights()


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Who writes rationales: a model loaded here, or one behind an OpenAI-compatible endpoint."""

    name: str
    model: str  # hub id or folder, or the name that the endpoint serves
    base_url: str | None = None  # of the endpoint; None loads the model here
    api_key_variable: str | None = None  # environment variable that holds the endpoint's key

    def __post_init__(self) -> None:
        for name in ("name", "model"):
            if not getattr(self, name):
                raise OptionError(f"{name} is '': it must not be empty")


@dataclass(frozen=True, kw_only=True)
class PoolRecipe:
    """Stage 1: who writes rationales, and how many."""

    workers: tuple[WorkerSettings, ...]
    samples: int  # rationales per worker and question
    max_tokens: int  # of one answer
    temperature: float
    # Questions that reinforcement has to itself: stages 1 to 3 never see them, since a model that has memorised a
    # question's direct embedding finds no gain in reasoning. At most a fifth of each task's; 0: it sees the same ones.
    held_apart: int = 8192

    def __post_init__(self) -> None:
        names = [worker.name for worker in self.workers]
        if not names:
            raise OptionError("workers is []: name at least one")
        if len(set(names)) < len(names):
            raise OptionError(f"workers are named {', '.join(names)}: each needs a name of its own")
        check_bounds(self, "samples", "max_tokens", least=1)
        check_bounds(self, "temperature", "held_apart", least=0)


@dataclass(frozen=True)
class Margins:
    """What a kept rationale must exceed, in nats of the evaluator's confidence."""

    gain: float = 0.5  # it must help its pair by so much
    content: float = 0.5  # and by so much more than other questions' rationales do
    against_negatives: bool = False  # subtract the mean gain on hard negatives first: "false-helpful" rationales

    def __post_init__(self) -> None:
        check_bounds(self, "gain", "content", least=0)


@dataclass(frozen=True, kw_only=True)
class SelectionRecipe:
    """Stage 2: who judges rationales, by what, and how the kept ones are drawn."""

    evaluator: Literal["judge", "embedder"]
    margins: Margins = Margins()
    temperature: float = 0.02  # of the embedder's softmax over candidates
    sampling_temperature: float = 4.0  # nats: kept rationales are drawn in proportion to exp(gain / this)
    hard_negatives: int = 8  # candidates beside the target
    other_rationales: int = 2  # of other questions, that each worker's are compared with
    # What a question is taught that no rationale helped although it needs one: to stop, as one that needs none, or
    # nothing of its decision. Its workers failed, which says nothing of what the trained model could write.
    unhelped: Unhelped = "undecided"

    def __post_init__(self) -> None:
        check_bounds(self, "temperature", "sampling_temperature", above=0)
        check_bounds(self, "hard_negatives", least=0)
        check_bounds(self, "other_rationales", least=1)
        if self.margins.against_negatives and self.evaluator == "judge":
            raise OptionError(
                "margins.against_negatives is true and evaluator is 'judge', which reads no negatives: set it to "
                "'embedder', or against_negatives to false"
            )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The weights of the joint loss."""

    temperature: float = 0.02
    lambda_g: float = 1.0  # of the next-token terms
    lambda_d: float = 1.0  # of the direct embedding's InfoNCE
    dims: tuple[int, ...]  # Matryoshka sizes, largest first
    teach_decision: bool = True  # False while only rationales of one's own are at hand, as for a backbone

    def __post_init__(self) -> None:
        check_bounds(self, "temperature", above=0)
        check_bounds(self, "lambda_g", "lambda_d", least=0)
        if not self.dims or list(self.dims) != sorted(set(self.dims), reverse=True) or self.dims[-1] < 1:
            raise OptionError(f"dims is {list(self.dims)}: list each size once, largest first, all at least 1")

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the loss that the terms add up to."""
        taught = terms["rationale"] + (terms["decision"] if self.teach_decision else 0)
        return terms["reasoned"] + self.lambda_g * taught + self.lambda_d * terms["direct"]


@dataclass(frozen=True, kw_only=True)
class JointRecipe:
    """Stage 3: how a model is trained jointly, and towards what."""

    schedule: Schedule
    objective: Objective
    batch: int  # questions of a step, over all processes
    # Of a question beside its own target: the first so many of those that its data set names. None are mined for stage
    # 3: the public model that it starts from does not embed yet.
    hard_negatives: int = 2
    micro_batch: int | None = None  # questions that a process reads at once, and apart from them their targets
    length_groups: int = 1  # parts of alike length in which questions are read, for little padding

    def __post_init__(self) -> None:
        check_bounds(self, "batch", "micro_batch", "length_groups", least=1)
        check_bounds(self, "hard_negatives", least=0)

    def chunks(self, processes: int) -> int:
        """Return in how many parts each process reads its share of a step."""
        share = -(-self.batch // processes)
        return -(-share // (self.micro_batch or share))


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """The dials of the reward. `cost` trades quality for latency: what a rationale of full length must earn."""

    cost: float = 0.1
    sigma: float = 0.1  # the gap, in cosine, that earns the full reward
    well_formed: float = 0.1  # weight of that reward
    embedding: float = 0.5  # weight of that reward
    temperature: float = 0.02

    def __post_init__(self) -> None:
        check_bounds(self, "cost", "well_formed", "embedding", least=0)
        check_bounds(self, "sigma", "temperature", above=0)


@dataclass(frozen=True, kw_only=True)
class RolloutServer:
    """The vLLM server that writes stage 4's rationales: it serves what stage 3 left, and reads the run's folder."""

    base_url: str
    model: str  # the name under which it serves `joint/checkpoint`
    api_key_variable: str | None = None  # environment variable that holds its key
    concurrency: int = 64  # questions that are asked at once, by each process
    timeout: float = 600.0  # seconds without an answer

    def __post_init__(self) -> None:
        for name in ("base_url", "model"):
            if not getattr(self, name):
                raise OptionError(f"{name} is '': it must not be empty")
        check_bounds(self, "concurrency", least=1)
        check_bounds(self, "timeout", above=0)


@dataclass(frozen=True, kw_only=True)
class ControlRecipe:
    """Stage 4: how adaptive control is learnt."""

    schedule: Schedule
    rewards: Rewards = field(default_factory=Rewards)
    method: Method | None = None  # which weights train in this stage; None: those of [weights]
    queries: int = 16  # questions of a batch of rollouts, over all processes
    group: int = 8  # rollouts of a question
    updates: int = 2  # steps on each batch of rollouts; the second and later ones are clipped
    clip: float = 0.2
    beta: float = 0.04  # of the KL to the model that stage 3 left
    anchor: float = 50.0  # weight of keeping the embeddings where stage 3 left them
    groups: Groups = "paired"
    advantage: Advantage = "centred"
    micro_batch: int | None = None  # questions that a process reads at once, each with its group
    log_norms_every: int = 10  # steps between measurements of each term's gradient norm, where all are read at once
    rollouts: RolloutServer | None = None  # who writes the rationales; None: this process, for small models

    def __post_init__(self) -> None:
        check_bounds(self, "queries", "updates", "micro_batch", "log_norms_every", least=1)
        check_bounds(self, "group", least=2)
        check_bounds(self, "clip", above=0, below=1)
        check_bounds(self, "beta", "anchor", least=0)
        if self.schedule.steps is None:
            raise OptionError("schedule.epochs is set: this stage counts steps, set schedule.steps")
        if self.schedule.save_every % self.updates:
            raise OptionError(
                f"schedule.save_every is {self.schedule.save_every}: it must be a multiple of updates "
                f"({self.updates}), so that a resumed run begins with fresh rollouts"
            )


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """The settings of a run over all stages. `name` is the packaged recipe's or the file's."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    name: str
    model: StartModel
    weights: TrainedWeights
    pool: PoolRecipe
    selection: SelectionRecipe
    joint: JointRecipe
    control: ControlRecipe

    def weights_of(self, stage: str) -> TrainedWeights:
        """Return which weights train in stage "joint" or "control"."""
        method = self.control.method if stage == "control" else None
        return replace(self.weights, method=method or self.weights.method)

    def check_control(self, processes: int) -> None:
        """Raise OptionError where stage 4 would train all weights in several processes."""
        if processes > 1 and self.weights_of("control").adapters is None:
            raise OptionError(
                f"control trains all weights on {processes} GPUs: they would be sharded, and rollouts decode with "
                "whole ones; set control.method = 'lora', whose reference shares the weights, or use one GPU"
            )

    def with_method(self, method: str | None) -> RunRecipe:
        """Return the recipe with another method; None keeps its own. Raises OptionError for one that is not known."""
        if method is None:
            return self
        check_known("method", method, get_args(Method))
        return changed(self, "weights.method", method)


def changed(recipe: RunRecipe, path: str, value: Any) -> RunRecipe:
    """Return a recipe with another value of "section.key". Raises OptionError for one that is out of bounds."""
    section, key = path.split(".")
    new: dict[str, Any] = {section: replace(getattr(recipe, section), **{key: value})}
    return replace(recipe, **new)
