"""What a run takes of a machine: memory by term, how much is read at once, and the changes after which it fits.

A run takes its micro batches from here. Memory is what lasts from step to step, and the largest of three that are held
one after the other: activations, the optimizer's temporaries, the loss. Tests hold the activations against the peak of
a real backward pass, and the rest against what torch allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mmemb_deploy.errors import OptionError
from mmemb_training.recipes.counts import (
    TEXT_TOKENS,
    PromptSize,
    activation_bytes,
    frame_pairs,
    longest_prompt,
    loss_bytes,
    mean_prompt,
)
from mmemb_training.recipes.hours import Figure, stage_costs
from mmemb_training.recipes.machines import GIB, RESERVE, Machine
from mmemb_training.recipes.settings import RunRecipe, TrainedWeights
from mmemb_training.recipes.shapes import ModelShape

FILL = 0.5  # share of the limits on pixels and answers that a mean example uses; assumed
MOST_GPUS = 1024
SHORTEST_PROMPT = 256  # tokens; below it, no image of use is left


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """The memory of a stage on each GPU, with as many questions at once as fit, or as the recipe says."""

    stage: str
    terms: dict[str, tuple[float, str]]  # bytes, and how they were found
    micro_batch: int  # questions at once, at least 1
    share: int  # questions of a step on each GPU
    usable: float  # bytes

    @property
    def bytes(self) -> float:
        """What the terms add up to."""
        return sum(size for size, _ in self.terms.values())

    @property
    def fits(self) -> bool:
        """Whether that is within what is usable."""
        return self.bytes <= self.usable

    @property
    def chunks(self) -> int:
        """Parts in which a GPU reads its share of a step."""
        return -(-self.share // self.micro_batch)

    def reason(self) -> str:
        """Say by how much it does not fit, and which term is the largest."""
        size, name = max((size, name) for name, (size, _) in self.terms.items())
        return (
            f"stage {self.stage} needs {self.bytes / GIB:.1f} GiB on each GPU with {self.micro_batch} question(s) at "
            f"once, and {self.usable / GIB:.1f} GiB are usable; the largest term is {name}, {size / GIB:.1f} GiB"
        )

    def figures(self) -> dict[str, Figure]:
        """Return its terms, their sum, and what follows."""
        return {name: Figure(size, "B", basis) for name, (size, basis) in self.terms.items()} | {
            "all": Figure(self.bytes, "B", "the sum"),
            "usable": Figure(self.usable, "B", "memory less the reserve"),
            "at once": Figure(self.micro_batch, "", "questions: what is left beside what lasts / one's activations"),
            "chunks": Figure(self.chunks, "", f"the GPU's share of a step, {self.share}, / questions at once"),
        }


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs, whether the machine has it, and what would have to change if not."""

    stages: dict[str, StageMemory]  # "joint" and "control"
    changes: tuple[str, ...]  # each makes all fit by itself, the smallest first
    figures: dict[str, dict[str, Figure]]  # by section and name

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for stage in self.stages.values())

    @property
    def reason(self) -> str:
        """What is too large, and by how much."""
        return "; ".join(stage.reason() for stage in self.stages.values() if not stage.fits)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate in JSON's types."""
        return {
            "fits": self.fits,
            "reason": self.reason,
            "changes": self.changes,
            **{name: {"micro_batch": one.micro_batch, "chunks": one.chunks} for name, one in self.stages.items()},
            "figures": {
                section: {name: figure._asdict() for name, figure in figures.items()}
                for section, figures in self.figures.items()
            },
        }


def estimate(
    shape: ModelShape, recipe: RunRecipe, machine: Machine, *, examples: int = 100_000, fill: float = FILL
) -> Estimate:
    """Estimate a run of a recipe on a machine.

    `examples` are the pairs of stages 1 to 3; `fill` is the share of the limits on pixels and answers that a mean
    example uses. Raises OptionError for values that no run can have; one that does not fit is an estimate that says so.
    """
    if examples < 1:
        raise OptionError(f"examples is {examples}: it must be at least 1")
    if not 0 < fill <= 1:
        raise OptionError(f"fill is {fill}: it must be above 0 and at most 1")
    if recipe.joint.batch < machine.gpus:
        raise OptionError(f"batch is {recipe.joint.batch}: each of {machine.gpus} GPUs needs at least 1 of it")
    largest = recipe.joint.objective.dims[0]
    if largest > shape.text.hidden:
        raise OptionError(f"objective.dims holds {largest}: {shape.name} has embeddings of {shape.text.hidden}")
    stages = _memory(shape, recipe, machine)
    cached = machine.gpus > 1 or stages["joint"].chunks > 1
    flops, hours = stage_costs(shape, recipe, machine, examples, fill, cached=cached)
    made = Estimate(
        stages=stages,
        changes=(),
        figures={
            **_assumptions(shape, recipe, machine, fill),
            **{f"memory of a GPU, stage {stage.stage}": stage.figures() for stage in stages.values()},
            "arithmetic": flops,
            "time": hours,
        },
    )
    return made if made.fits else replace(made, changes=tuple(_changes_that_fit(shape, recipe, machine)))


def _memory(shape: ModelShape, recipe: RunRecipe, machine: Machine) -> dict[str, StageMemory]:
    """Return the memory of stages 3 and 4, for prompts and rationales of full length.

    At once, stage 3 reads some questions with a rationale each, and then the targets of as many; stage 4 reads
    questions with a group of rationales each.
    """
    joint, control, weights, gpus = recipe.joint, recipe.control, recipe.weights, machine.gpus
    prompt, written = longest_prompt(shape, recipe.model), recipe.model.max_rationale_tokens
    targets, dims = 1 + joint.hard_negatives, len(joint.objective.dims)
    pairs = loss_bytes(joint.batch, joint.batch * targets, dims)
    trained = _trained_parameters(shape, weights) / (1 if weights.adapters else gpus)

    def stage(
        name: str, questions: int, given: int | None, loss: tuple[float, str], *read: tuple[int, PromptSize]
    ) -> StageMemory:
        lasting = _lasting_terms(shape, weights, gpus, reference=name.endswith("(control)"))
        each, count, size = max(
            ((count * activation_bytes(shape, weights, gpus, size), count, size) for count, size in read),
            key=lambda one: one[0],
        )
        share, left = -(-questions // gpus), machine.usable_bytes - sum(size for size, _ in lasting.values())
        at_once = min(share, given or max(1, int(left // each)))
        passing = {
            "activations": (
                at_once * each,
                f"{at_once} question(s), with {count} prompt(s) each of {size.tokens} tokens ({size.frames} frames of "
                f"{size.patches} patches) and {size.rationales} rationale(s) of {size.rationale_tokens}, checkpointing "
                f"{'on' if weights.gradient_checkpointing else 'off'}: what waits for the backward pass, and its "
                "widest moment",
            ),
            "optimizer step": (4 * trained, "4 B per trained weight: AdamW's temporaries"),
            "loss": loss,
        }
        largest = max(passing, key=lambda term: passing[term][0])
        return StageMemory(
            stage=name,
            terms={**lasting, largest: passing[largest]},
            micro_batch=at_once,
            share=share,
            usable=machine.usable_bytes,
        )

    return {
        "joint": stage(
            "3 (joint)",
            joint.batch,
            joint.micro_batch,
            (pairs, f"{joint.batch} x {joint.batch * targets} pairs, {dims} sizes"),
            (1, prompt.followed(1, written)),
            (targets, prompt),
        ),
        "control": stage(
            "4 (control)",
            control.queries,
            control.micro_batch,
            (0.0, "of one group at a time"),
            (1, prompt.followed(control.group, written)),
        ),
    }


def _trained_parameters(shape: ModelShape, weights: TrainedWeights) -> int:
    lora = weights.adapters
    return shape.parameters() if lora is None else shape.lora_parameters(lora.rank, lora.targets)


def _lasting_terms(
    shape: ModelShape, weights: TrainedWeights, gpus: int, *, reference: bool = False
) -> dict[str, tuple[float, str]]:
    """Return what is held from step to step. `reference` adds the frozen snapshot of stage 4."""
    parameters, trained, width = shape.parameters(), _trained_parameters(shape, weights), weights.value_bytes
    if weights.adapters:
        each, buckets = (20, "; DDP's gradient buckets 4") if gpus > 1 else (16, "")
        return {
            "frozen weights": (width * parameters, f"{width} B x {parameters:,} parameters, on every GPU"),
            "adapters and optimizer": (
                each * trained,
                f"{each} B x {trained:,}: fp32 weights 4, gradients 4, AdamW moments 8{buckets}",
            ),
        }
    shard = f"{parameters:,} parameters" + (f" / {gpus} GPUs (FSDP2)" if gpus > 1 else "")
    terms: dict[str, tuple[float, str]] = {
        "weights": (4 * parameters / gpus, f"4 B (fp32 master) x {shard}"),
        "gradients": (4 * parameters / gpus, f"4 B (fp32) x {shard}"),
        "optimizer": (8 * parameters / gpus, f"8 B (AdamW's two moments, fp32) x {shard}"),
    }
    layer, layers = shape.text.layer_parameters(), shape.text.layers
    if gpus > 1:
        root = parameters - layers * layer - shape.vision.layers * shape.vision.layer_parameters()
        terms["gathered weights"] = (
            2 * width * (root + 2 * layer),
            f"{width} B x 2 (weights, gradients) x (all outside layers {root:,} + 2 layers of {layer:,}): FSDP2 "
            "gathers a layer while the one before it runs",
        )
    elif width == 2:
        terms["bf16 copies"] = 2 * parameters, f"2 B x {shard}: autocast keeps them for the step"
    terms["waiting gradients"] = (
        width * layers * layer,
        f"{width} B x {layers} text layers of {layer:,}: those of the rationale wait for those of the prompt",
    )
    if reference:
        terms["reference"] = width * parameters / gpus, f"{width} B x {shard}: the frozen snapshot"
    return terms


def _changes_that_fit(shape: ModelShape, recipe: RunRecipe, machine: Machine) -> list[str]:
    """Return the changes after which all fits, the smallest first; each is the least of its kind that does."""
    found: dict[str, str] = {}
    for kind, said, changed, other in _changes(shape, recipe, machine):
        if kind not in found and all(stage.fits for stage in _memory(shape, changed, other).values()):
            found[kind] = said
    return list(found.values())


def _changes(shape: ModelShape, recipe: RunRecipe, machine: Machine) -> Iterator[tuple[str, str, RunRecipe, Machine]]:
    """Yield changes by kind, each kind's smallest first."""
    model, joint, control = recipe.model, recipe.joint, recipe.control
    if not recipe.weights.gradient_checkpointing:
        weights = replace(recipe.weights, gradient_checkpointing=True)
        yield "recompute", "weights.gradient_checkpointing = true", replace(recipe, weights=weights), machine
    for key, least in (("micro_batch", 1), ("batch", machine.gpus)):
        for size in _halves(getattr(joint, key), least):
            changed = replace(recipe, joint=replace(joint, **{key: size}))
            yield f"joint.{key}", f"joint.{key} = {size}", changed, machine
    for key, least in (("micro_batch", 1), ("group", 2)):
        for size in _halves(getattr(control, key), least):
            changed = replace(recipe, control=replace(control, **{key: size}))
            yield f"control.{key}", f"control.{key} = {size}", changed, machine
    gpus = 2 * machine.gpus
    while gpus <= min(MOST_GPUS, joint.batch):
        yield "gpus", f"{gpus} GPUs", recipe, replace(machine, gpus=gpus)
        gpus *= 2
    lora = recipe.with_method("lora")
    if lora != recipe:
        yield "lora", "method = lora", lora, machine
    pairs, unit = frame_pairs(shape, model), (shape.vision.patch * shape.vision.merge) ** 2
    for tokens in _halves(model.max_tokens, max(SHORTEST_PROMPT, TEXT_TOKENS + pairs)):
        shorter = replace(
            model,
            max_tokens=tokens,
            max_pixels=min(model.max_pixels, (tokens - TEXT_TOKENS) * unit),
            video_max_pixels=min(model.video_max_pixels, max(1, (tokens - TEXT_TOKENS) // pairs) * unit),
            max_rationale_tokens=min(model.max_rationale_tokens, tokens),
        )
        said = f"prompts of at most {tokens} tokens"
        yield "prompt", said, replace(recipe, model=shorter), machine
        if lora != recipe:
            yield "lora", f"method = lora and {said}", replace(lora, model=shorter), machine
    most = max(stage.bytes for stage in _memory(shape, recipe, machine).values())
    needed = -(-most // GIB) / (1 - RESERVE) + 1
    yield "memory", f"{needed:.0f} GiB on each GPU", recipe, replace(machine, memory_gib=needed)


def _halves(value: int | None, least: int) -> Iterator[int]:
    """Yield the half of a value, the half of that, and so on, down to `least`."""
    while value and value // 2 >= least:
        value //= 2
        yield value


def _assumptions(shape: ModelShape, recipe: RunRecipe, machine: Machine, fill: float) -> dict[str, dict[str, Figure]]:
    longest, mean = longest_prompt(shape, recipe.model), mean_prompt(shape, recipe.model, fill)
    peak = None if machine.tflops is None else machine.tflops * 1e12
    lora = recipe.weights.adapters
    factors = "all"
    if lora:
        factors = f"rank {lora.rank} x (in + out) of {', '.join(lora.targets)} in every text layer; the markers' rows"
    return {
        "assumed": {
            "GPUs": Figure(machine.gpus, "", f"{machine.name}, {machine.memory_gib:g} GiB each"),
            "peak": Figure(peak, "FLOP/s", f"dense bf16 of each GPU: {machine.source or 'no device named'}"),
            "utilisation": Figure(machine.utilisation, "", "of the peak, on executed operations; pass another"),
            "memory reserve": Figure(RESERVE, "", "share kept for context, communication, fragments"),
            "longest prompt": Figure(longest.tokens, "", "tokens, for memory: the recipe's model.max_tokens"),
            "mean prompt": Figure(
                mean.tokens,
                "",
                f"tokens, for time: one image of {fill:g} x max_pixels, and {TEXT_TOKENS} of text; pass --fill",
            ),
        },
        "parameters": {
            "all": Figure(shape.parameters(), "", f"counted from the shape; {shape.source}"),
            "trained": Figure(_trained_parameters(shape, recipe.weights), "", factors),
        },
    }
