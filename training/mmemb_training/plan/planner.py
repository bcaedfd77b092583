"""The plan of a run: parameters, memory, what fits, arithmetic and hours, each line with the formula it comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mmemb_deploy.errors import OptionError
from mmemb_training.plan.arithmetic import forward_flops
from mmemb_training.plan.devices import Machine
from mmemb_training.plan.fit import Fit, changes_that_fit, fits_all
from mmemb_training.plan.loads import FILL, TEXT_TOKENS, check_dims, longest_prompt, mean_prompt, with_paths
from mmemb_training.plan.recipes import Recipe
from mmemb_training.plan.shapes import ModelShape
from mmemb_training.plan.stages import Stage, joint_step_flops, stages


@dataclass(frozen=True)
class Line:
    """One figure of a plan. `unit` is one of "", "B", "FLOP" and "h"; `value` None is a figure that is not known."""

    section: str
    name: str
    value: float | None
    unit: str
    basis: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs, whether the machine has it, and what would have to change if not."""

    model: str
    recipe: str
    method: str
    examples: int
    fits: bool
    reason: str | None  # what is too large, and by how much
    changes: tuple[str, ...]  # each makes it fit by itself, the smallest first
    micro_batch: int  # prompts that a GPU reads at once in stage 3
    chunks: int  # parts of a GPU's share of a step's queries; targets are as many for each of a query's
    control_micro_batch: int  # questions at once in stage 4
    lines: tuple[Line, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in JSON's types."""
        return asdict(self)

    def line(self, section: str, name: str) -> Line:
        """Return one line; raises KeyError where there is none."""
        for line in self.lines:
            if (line.section, line.name) == (section, name):
                return line
        raise KeyError((section, name))


def make_plan(
    shape: ModelShape,
    recipe: Recipe,
    machine: Machine,
    *,
    examples: int = 100_000,
    batch: int | None = None,
    fill: float = FILL,
) -> Plan:
    """Plan a run of a recipe on a machine.

    `batch` replaces the recipe's; `examples` are the pairs of stages 1 to 3; `fill` is the share of the limits on
    pixels and answers that a mean example uses. Raises OptionError for values that no run can have; a run that does
    not fit is a plan that says so.
    """
    if examples < 1:
        raise OptionError(f"examples is {examples}: it must be at least 1")
    if not 0 < fill <= 1:
        raise OptionError(f"fill is {fill}: it must be above 0 and at most 1")
    if batch is not None:
        recipe = recipe.model_copy(update={"joint": recipe.joint.model_copy(update={"batch": batch})})
    if recipe.joint.batch < machine.gpus:
        raise OptionError(f"batch is {recipe.joint.batch}: each of {machine.gpus} GPUs needs at least 1 of it")
    check_dims(shape, recipe)
    joint, control = fits_all(shape, recipe, machine)
    fits = joint.fits and control.fits
    too_large = "; ".join(fit.reason() for fit in (joint, control) if not fit.fits)
    counted = stages(shape, recipe, machine, examples, fill, joint.chunks)
    return Plan(
        model=shape.name,
        recipe=recipe.name,
        method=recipe.model.method,
        examples=examples,
        fits=fits,
        reason=too_large or None,
        changes=() if fits else tuple(changes_that_fit(shape, recipe, machine)),
        micro_batch=joint.at_once,
        chunks=joint.chunks,
        control_micro_batch=control.at_once,
        lines=(
            *_assumptions(shape, recipe, machine, fill),
            *_parameters(shape, recipe),
            *_memory(joint),
            *_memory(control),
            *_arithmetic(shape, recipe, machine, joint, fill),
            *_time(counted, machine),
        ),
    )


def _assumptions(shape: ModelShape, recipe: Recipe, machine: Machine, fill: float) -> list[Line]:
    device = machine.device
    longest, mean = longest_prompt(shape, recipe.joint), mean_prompt(shape, recipe.joint, fill)
    peak = None if device.tflops is None else device.tflops * 1e12
    return [
        Line("assumed", "GPUs", machine.gpus, "", f"{device.name}, {machine.memory_gib:g} GiB each"),
        Line("assumed", "peak", peak, "FLOP/s", f"dense bf16 of each GPU: {device.source}"),
        Line("assumed", "utilisation", machine.utilisation, "", "of the peak, on executed operations; pass another"),
        Line("assumed", "memory reserve", machine.reserve, "", "share kept for context, communication, fragments"),
        Line("assumed", "longest prompt", longest.tokens, "", "tokens, for memory: the recipe's joint.max_tokens"),
        Line(
            "assumed",
            "mean prompt",
            mean.tokens,
            "",
            f"tokens, for time: one image of {fill:g} x max_pixels, and {TEXT_TOKENS} of text; pass --fill",
        ),
    ]


def _parameters(shape: ModelShape, recipe: Recipe) -> list[Line]:
    lines = [
        Line("parameters", "language model", shape.text.parameters(), "", f"counted from the shape; {shape.source}"),
        Line("parameters", "vision tower", shape.vision.parameters(), "", "counted from the shape, mergers included"),
        Line("parameters", "all", shape.parameters(), "", "the sum; a tied head is the embedding table"),
    ]
    if recipe.model.method == "full":
        return [*lines, Line("parameters", "trained", shape.parameters(), "", "all")]
    lora = recipe.model.lora
    trained = shape.lora_parameters(lora.rank, lora.targets)
    basis = f"rank {lora.rank} x (in + out) of {', '.join(lora.targets)} in every text layer; 2 rows of the embeddings"
    return [*lines, Line("parameters", "trained", trained, "", basis)]


def _memory(fit: Fit) -> list[Line]:
    section = f"memory of a GPU, stage {fit.stage}"
    lines = [Line(section, term.name, term.bytes, "B", term.basis) for term in fit.terms]
    return [
        *lines,
        Line(section, "all", fit.bytes, "B", "the sum"),
        Line(section, "usable", fit.usable_bytes, "B", "memory less the reserve"),
        Line(section, "at once", fit.at_once, "", "prompts of a chunk: what is left after the states / one prompt's"),
        Line(section, "chunks", fit.chunks, "", f"the GPU's share of a step, {fit.share}, / prompts at once"),
    ]


def _arithmetic(shape: ModelShape, recipe: Recipe, machine: Machine, joint: Fit, fill: float) -> list[Line]:
    query = with_paths(mean_prompt(shape, recipe.joint, fill), 1, fill * recipe.joint.max_rationale_tokens)
    step, basis = joint_step_flops(shape, recipe, fill, cached=machine.gpus > 1 or joint.chunks > 1)
    return [
        Line(
            "arithmetic",
            "forward of a query",
            forward_flops(shape, query),
            "FLOP",
            "2 x weights x tokens, and 4 x tokens x context x width of attention per layer; vision, text, logits",
        ),
        Line("arithmetic", "step of stage 3", step, "FLOP", basis),
    ]


def _time(counted: list[Stage], machine: Machine) -> list[Line]:
    lines: list[Line] = []
    for stage in counted:
        lines.append(Line("time", stage.name, stage.hours, "h", f"{stage.flops:.3g} FLOP: {stage.basis}"))
        if stage.tokens:
            speed = "at the longer of arithmetic and reading weights and caches from memory"
            lines.append(Line("time", f"{stage.name}, generated", stage.tokens, "tokens", speed))
        if stage.elsewhere:
            lines.append(
                Line("time", f"{stage.name}, elsewhere", stage.elsewhere, "tokens", "on machines that are not planned")
            )
    known = [stage.hours for stage in counted if stage.hours is not None]
    total = sum(known) if len(known) == len(counted) else None
    per_gpu = None if total is None else total * machine.gpus
    return [
        *lines,
        Line("time", "all", total, "h", "the sum; without data loading, evaluation and restarts"),
        Line("time", "all, GPU hours", per_gpu, "h", f"x {machine.gpus} GPUs"),
    ]
