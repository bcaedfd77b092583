"""What a run takes of a machine: memory by term, how much is read at once, and the changes after which it fits.

A run takes its micro batches from here. Memory is what lasts from step to step, and the largest of three that are held
one after the other: activations, the optimizer's temporaries, the loss. Tests hold the activations against the peak of
a real backward pass, and the rest against what torch allocates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from mmemb_deploy.devices import GIB, RESERVE
from mmemb_deploy.errors import OptionError
from mmemb_deploy.figures import Figure
from mmemb_training.recipes.counts import (
    TEXT_TOKENS,
    PromptSize,
    activation_bytes,
    frame_pairs,
    longest_prompt,
    loss_bytes,
    mean_prompt,
)
from mmemb_training.recipes.host import host_figures
from mmemb_training.recipes.hours import stage_costs
from mmemb_training.recipes.machines import Machine
from mmemb_training.recipes.settings import RunRecipe, StartModel, TrainedWeights, changed
from mmemb_training.recipes.shapes import ModelShape

FILL = 0.5  # share of the limits on pixels and answers that a mean example uses; assumed
MOST_GPUS = 1024
SHORTEST_PROMPT = 256  # tokens; below it, no image of use is left

Terms = dict[str, Figure]


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """The memory of a stage on each GPU, with as many questions at once as fit, or as the recipe says."""

    name: str
    terms: Terms  # in bytes
    micro_batch: int  # questions at once, at least 1
    share: int  # questions of a step on each GPU
    usable: float  # bytes

    @property
    def bytes(self) -> float:
        """What the terms add up to."""
        return _sum(self.terms)

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
        size, name = max((term.value or 0, name) for name, term in self.terms.items())
        return (
            f"stage {self.name} needs {self.bytes / GIB:.1f} GiB on each GPU with {self.micro_batch} question(s) at "
            f"once, and {self.usable / GIB:.1f} GiB are usable; the largest term is {name}, {size / GIB:.1f} GiB"
        )

    def figures(self) -> Terms:
        """Return its terms, their sum, and what follows."""
        return self.terms | {
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
    figures: dict[str, Terms]  # by section and name

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
        stages = {name: {"micro_batch": one.micro_batch, "chunks": one.chunks} for name, one in self.stages.items()}
        figures = {
            section: {name: figure._asdict() for name, figure in terms.items()}
            for section, terms in self.figures.items()
        }
        return {"fits": self.fits, "reason": self.reason, "changes": self.changes, **stages, "figures": figures}


def estimate(
    shape: ModelShape, recipe: RunRecipe, machine: Machine, *, examples: int = 100_000, fill: float = FILL
) -> Estimate:
    """Estimate a run of a recipe on a machine.

    `examples` are the pairs of stages 1 to 3; `fill` is the share of the limits on pixels and answers that a mean
    example uses. Raises OptionError for values that no run can have, such as a control that is sharded; one that does
    not fit is an estimate that says so.
    """
    if examples < 1:
        raise OptionError(f"examples is {examples}: it must be at least 1")
    if not 0 < fill <= 1:
        raise OptionError(f"fill is {fill}: it must be above 0 and at most 1")
    if recipe.joint.batch < machine.gpus:
        raise OptionError(f"batch is {recipe.joint.batch}: each of {machine.gpus} GPUs needs at least 1 of it")
    if recipe.joint.objective.dims[0] > shape.text.hidden:
        sizes = f"objective.dims holds {recipe.joint.objective.dims[0]}"
        raise OptionError(f"{sizes}: {shape.name} has embeddings of {shape.text.hidden}")
    recipe.check_control(machine.gpus)
    stages = _memory(shape, recipe, machine)
    cached = machine.gpus > 1 or stages["joint"].chunks > 1
    flops, hours = stage_costs(shape, recipe, machine, examples, fill, cached=cached)
    figures = {
        "assumed": _assumptions(shape, recipe, machine, fill),
        **{f"memory of a GPU, stage {stage.name}": stage.figures() for stage in stages.values()},
        "arithmetic": flops,
        "time": hours,
        "beside the GPUs": host_figures(shape, recipe, machine, examples, fill, hours["3 joint"].value),
    }
    fits = all(stage.fits for stage in stages.values())
    changes = () if fits else tuple(_changes_that_fit(shape, recipe, machine))
    return Estimate(stages=stages, changes=changes, figures=figures)


def _memory(shape: ModelShape, recipe: RunRecipe, machine: Machine) -> dict[str, StageMemory]:
    """Return the memory of stages 3 and 4, for prompts and rationales of full length.

    At once, stage 3 reads some questions with a rationale each, and then the targets of as many; stage 4 reads
    questions with a group of rationales each.
    """
    joint, control, gpus = recipe.joint, recipe.control, machine.gpus
    prompt, tokens = longest_prompt(shape, recipe.model), recipe.model.max_rationale_tokens
    targets, dims = 1 + joint.hard_negatives, len(joint.objective.dims)
    pairs = loss_bytes(joint.batch, joint.batch * targets, dims)
    loss = {"loss": Figure(pairs, "B", f"{joint.batch} x {joint.batch * targets} pairs, {dims} sizes")}

    def stage(
        name: str, questions: int, given: int | None, passing: Terms, *read: tuple[int, PromptSize]
    ) -> StageMemory:
        weights = recipe.weights_of("control" if name == "4 (control)" else "joint")
        trained = _trained_parameters(shape, weights) / (1 if weights.adapters else gpus)
        step = {"optimizer step": Figure(4 * trained, "B", "4 B per trained weight: AdamW's temporaries")}
        lasting = _lasting_terms(shape, weights, gpus, reference=name == "4 (control)")
        each = [count * activation_bytes(shape, weights, gpus, size) for count, size in read]
        count, size = read[each.index(max(each))]
        share, left = -(-questions // gpus), machine.usable_bytes - _sum(lasting)
        at_once = min(share, given or max(1, int(left // max(each))))
        basis = (
            f"{at_once} question(s), for each {count} prompt(s) of {size.tokens} tokens ({size.frames} frames of "
            f"{size.patches} patches) with {size.rationales} rationale(s) of {size.rationale_tokens}, checkpointing "
            f"{'on' if weights.gradient_checkpointing else 'off'}: what waits for the backward pass, at its widest"
        )
        passing = step | passing | {"activations": Figure(at_once * max(each), "B", basis)}
        largest = max(passing, key=lambda term: passing[term].value or 0)
        terms = {**lasting, largest: passing[largest]}
        return StageMemory(name=name, terms=terms, micro_batch=at_once, share=share, usable=machine.usable_bytes)

    question, group = (1, prompt.followed(1, tokens)), (1, prompt.followed(control.group, tokens))
    return {
        "joint": stage("3 (joint)", joint.batch, joint.micro_batch, loss, question, (targets, prompt)),
        "control": stage("4 (control)", control.queries, control.micro_batch, {}, group),
    }


def _sum(terms: Terms) -> float:
    return sum(term.value or 0 for term in terms.values())


def _trained_parameters(shape: ModelShape, weights: TrainedWeights) -> int:
    lora = weights.adapters
    return shape.parameters() if lora is None else shape.lora_parameters(lora.rank, lora.targets)


def _lasting_terms(shape: ModelShape, weights: TrainedWeights, gpus: int, *, reference: bool) -> Terms:
    """Return what is held from step to step. `reference` adds the frozen snapshot of stage 4."""
    parameters, trained, width = shape.parameters(), _trained_parameters(shape, weights), weights.value_bytes
    held: list[tuple[str, int, float, str]]  # a term's bytes for each of so many values
    if weights.adapters:
        each, buckets = (20, "; DDP's gradient buckets 4") if gpus > 1 else (16, "")
        held = [
            ("frozen weights", width, parameters, "parameters, on every GPU"),
            ("adapters and optimizer", each, trained, f"fp32 weights 4, gradients 4, AdamW's moments 8{buckets}"),
        ]
    else:
        own, shard = parameters / gpus, "parameters" + (f", 1 / {gpus} of all (FSDP2)" if gpus > 1 else "")
        layers, layer = shape.text.layers, shape.text.layer_parameters()
        root = parameters - layers * layer - shape.vision.layers * shape.vision.layer_parameters()
        gathered = "parameters outside layers and of 2 layers, and gradients: FSDP2 gathers one while another runs"
        held = [
            ("weights", 4, own, f"{shard}: fp32 master"),
            ("gradients", 4, own, f"{shard}: fp32"),
            ("optimizer", 8, own, f"{shard}: AdamW's two moments, fp32"),
            ("gathered weights", 2 * width * (gpus > 1), root + 2 * layer, gathered),
            ("bf16 copies", 2 * (gpus == 1 and width == 2), parameters, "parameters: autocast keeps them for the step"),
            ("waiting gradients", width, layers * layer, "text layers: the rationale's wait for the prompt's"),
            ("reference", width * reference, own, f"{shard}: the frozen snapshot"),
        ]
    return {
        name: Figure(each * count, "B", f"{each} B x {count:,.0f} {why}") for name, each, count, why in held if each
    }


def _changes_that_fit(shape: ModelShape, recipe: RunRecipe, machine: Machine) -> Iterator[str]:
    """Yield the changes after which all fits, the smallest kind first; each is the least of its kind that does."""
    for kind in _changes(shape, recipe, machine):
        for said, other, there in kind:
            if all(stage.fits for stage in _memory(shape, other, there).values()):
                yield said
                break


def _changes(
    shape: ModelShape, recipe: RunRecipe, machine: Machine
) -> Iterator[Iterable[tuple[str, RunRecipe, Machine]]]:
    """Yield kinds of changes, and of each kind what it says and makes, the smallest first."""

    def settings(path: str, values: Iterable[Any]) -> Iterable[tuple[str, RunRecipe, Machine]]:
        return (
            (f"{path} = {value}".replace("True", "true"), changed(recipe, path, value), machine) for value in values
        )

    yield settings("weights.gradient_checkpointing", [] if recipe.weights.gradient_checkpointing else [True])
    own = recipe.weights_of("control").adapters
    yield settings("control.method", ["lora"] if own is None else [])
    yield settings("joint.micro_batch", _halves(recipe.joint.micro_batch, 1))
    yield settings("joint.batch", _halves(recipe.joint.batch, machine.gpus))
    yield settings("control.micro_batch", _halves(recipe.control.micro_batch, 1))
    yield settings("control.group", _halves(recipe.control.group, 2))
    doubled = (machine.gpus * 2**power for power in range(1, MOST_GPUS.bit_length()))
    most = min(MOST_GPUS, recipe.joint.batch) if own else 1
    yield ((f"{gpus} GPUs", recipe, replace(machine, gpus=gpus)) for gpus in doubled if gpus <= most)
    shorter = list(_shorter(shape, recipe.model))
    if recipe.weights.adapters is None:
        lora = recipe.with_method("lora")
        both = ((f"method = lora and {said}", replace(lora, model=model), machine) for said, model in shorter)
        yield chain([("method = lora", lora, machine)], both)
    yield ((said, replace(recipe, model=model), machine) for said, model in shorter)
    needed = max(stage.bytes for stage in _memory(shape, recipe, machine).values())
    memory = -(-needed // GIB) / (1 - RESERVE) + 1
    yield [(f"{memory:.0f} GiB on each GPU", recipe, replace(machine, memory_gib=memory))]


def _halves(value: int | None, least: int) -> Iterator[int]:
    """Yield the half of a value, the half of that, and so on, down to `least`."""
    while value and value // 2 >= least:
        value //= 2
        yield value


def _shorter(shape: ModelShape, model: StartModel) -> Iterator[tuple[str, StartModel]]:
    """Yield shorter prompts, with as many pixels as those leave room for."""
    pairs, unit = frame_pairs(shape, model), (shape.vision.patch * shape.vision.merge) ** 2
    for tokens in _halves(model.planned_tokens, max(SHORTEST_PROMPT, TEXT_TOKENS + pairs)):
        left = tokens - TEXT_TOKENS
        yield (
            f"prompts of at most {tokens} tokens",
            replace(
                model,
                planned_tokens=tokens,
                max_pixels=min(model.max_pixels, left * unit),
                video_max_pixels=min(model.video_max_pixels, max(1, left // pairs) * unit),
                max_rationale_tokens=min(model.max_rationale_tokens, tokens),
            ),
        )


def _assumptions(shape: ModelShape, recipe: RunRecipe, machine: Machine, fill: float) -> Terms:
    lora, longest = recipe.weights.adapters, longest_prompt(shape, recipe.model)
    peak = None if machine.tflops is None else machine.tflops * 1e12
    example = f"tokens, for time: one image of {fill:g} x max_pixels, and {TEXT_TOKENS} of text; pass --fill"
    rows = f"rank {lora.rank} x (in + out) of {', '.join(lora.targets)}; the markers' rows" if lora else "all"
    return {
        "GPUs": Figure(machine.gpus, "", f"{machine.name}, {machine.memory_gib:g} GiB each"),
        "peak": Figure(peak, "FLOP/s", f"dense bf16 of each GPU: {machine.source or 'no device named'}"),
        "utilisation": Figure(machine.utilisation, "", "of the peak, on executed operations; pass another"),
        "memory reserve": Figure(RESERVE, "", "share kept for context, communication, fragments"),
        "longest prompt": Figure(longest.tokens, "", "tokens, for memory: the recipe's model.planned_tokens"),
        "mean prompt": Figure(mean_prompt(shape, recipe.model, fill).tokens, "", example),
        "parameters": Figure(shape.parameters(), "", f"counted from the shape; {shape.source}"),
        "trained parameters": Figure(_trained_parameters(shape, recipe.weights), "", rows),
    }
