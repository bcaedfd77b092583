"""Does a recipe fit a machine? How many prompts at once, what is too large, and which change would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mmemb_training.plan.devices import Machine
from mmemb_training.plan.loads import TEXT_TOKENS, frame_pairs, longest_prompt, with_paths
from mmemb_training.plan.memory import (
    GIB,
    Term,
    Training,
    activation_peaks,
    loss_bytes,
    optimizer_step_bytes,
    state_terms,
)
from mmemb_training.plan.recipes import Recipe
from mmemb_training.plan.shapes import ModelShape

MOST_GPUS = 1024
SHORTEST_PROMPT = 256  # tokens; below it, no image of use is left


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The memory of one stage on each GPU, with as many prompts at once as fit (at least 1), and the room there is."""

    stage: str
    terms: tuple[Term, ...]
    at_once: int  # prompts of a chunk
    share: int  # prompts of a step on each GPU
    usable_bytes: float

    @property
    def bytes(self) -> float:
        """What the terms add up to."""
        return sum(term.bytes for term in self.terms)

    @property
    def fits(self) -> bool:
        """Whether that is within the room."""
        return self.bytes <= self.usable_bytes

    @property
    def chunks(self) -> int:
        """Parts in which a GPU reads its share of a step."""
        return -(-self.share // self.at_once)

    def reason(self) -> str:
        """Say by how much it does not fit, and which term is the largest."""
        largest = max(self.terms, key=lambda term: term.bytes)
        return (
            f"stage {self.stage} needs {self.bytes / GIB:.1f} GiB on each GPU with {self.at_once} prompt(s) at once, "
            f"and {self.usable_bytes / GIB:.1f} GiB are usable; the largest term is {largest.name}, "
            f"{largest.bytes / GIB:.1f} GiB"
        )


def training_of(recipe: Recipe, gpus: int) -> Training:
    """Return what of the model a recipe trains."""
    lora = recipe.model.lora if recipe.model.method == "lora" else None
    return Training(
        method=recipe.model.method,
        precision=recipe.joint.precision,
        gpus=gpus,
        checkpointing=recipe.joint.gradient_checkpointing,
        rank=0 if lora is None else lora.rank,
        targets=() if lora is None else lora.targets,
    )


def fit_joint(shape: ModelShape, recipe: Recipe, machine: Machine) -> Fit:
    """Return the memory of stage 3: queries of the longest prompt with the longest rationale."""
    joint, training = recipe.joint, training_of(recipe, machine.gpus)
    load = with_paths(longest_prompt(shape, joint), 1, joint.max_rationale_tokens)
    share = -(-joint.batch // machine.gpus)
    pairs = loss_bytes(joint.batch, joint.batch * (1 + joint.hard_negatives), len(joint.dims))
    states = state_terms(shape, training)
    others = Term(
        "loss", pairs, f"{joint.batch} x {joint.batch * (1 + joint.hard_negatives)} pairs, {len(joint.dims)} sizes"
    )
    most = share if joint.micro_batch is None else min(joint.micro_batch, share)
    fixed = joint.micro_batch is not None
    return _fit("3 (joint)", shape, training, load, machine, states, others, share, most, fixed=fixed)


def fit_control(shape: ModelShape, recipe: Recipe, machine: Machine) -> Fit:
    """Return the memory of stage 4: questions of the longest prompt, each with a group of the longest rationales."""
    joint, control, training = recipe.joint, recipe.control, training_of(recipe, machine.gpus)
    load = with_paths(longest_prompt(shape, joint), control.group, joint.max_rationale_tokens)
    share = -(-control.queries // machine.gpus)
    states = state_terms(shape, training, reference=True)
    none = Term("loss", 0, "of one group at a time")
    return _fit("4 (control)", shape, training, load, machine, states, none, share, share, fixed=False)


def _fit(
    stage: str,
    shape: ModelShape,
    training: Training,
    load: Any,
    machine: Machine,
    states: list[Term],
    loss: Term,
    share: int,
    most: int,
    *,
    fixed: bool,
) -> Fit:
    usable = machine.usable_gib * GIB
    peaks = activation_peaks(shape, training, load, 1)
    moment = max(peaks, key=lambda name: peaks[name])
    room = usable - sum(term.bytes for term in states)
    at_once = most if fixed else max(1, min(most, int(room // peaks[moment])))
    others = [
        Term(
            "activations",
            at_once * peaks[moment],
            f"{at_once} prompt(s) of {load.tokens} tokens ({load.frames} frames of {load.patches} patches) with "
            f"{load.paths} rationale(s) of {load.words}, checkpointing {'on' if training.checkpointing else 'off'}; "
            f"the peak is at the moment '{moment}' of plan/memory.py",
        ),
        Term("optimizer step", optimizer_step_bytes(shape, training), "4 B per trained weight: AdamW's temporaries"),
        loss,
    ]
    # These three are held one after the other: the peak has the largest of them.
    return Fit(
        stage=stage,
        terms=(*states, max(others, key=lambda term: term.bytes)),
        at_once=at_once,
        share=share,
        usable_bytes=usable,
    )


def fits_all(shape: ModelShape, recipe: Recipe, machine: Machine) -> tuple[Fit, Fit]:
    """Return the memory of stages 3 and 4."""
    return fit_joint(shape, recipe, machine), fit_control(shape, recipe, machine)


def changes_that_fit(shape: ModelShape, recipe: Recipe, machine: Machine) -> list[str]:
    """Return the changes after which all fits, the smallest first; each is the least of its kind that does."""
    found: dict[str, str] = {}
    for kind, said, changed, other in _changes(shape, recipe, machine):
        if kind not in found and all(fit.fits for fit in fits_all(shape, changed, other)):
            found[kind] = said
    return list(found.values())


def _changes(shape: ModelShape, recipe: Recipe, machine: Machine) -> Iterator[tuple[str, str, Recipe, Machine]]:
    joint = recipe.joint
    if not joint.gradient_checkpointing:
        yield "checkpointing", "gradient_checkpointing = true", _joint(recipe, gradient_checkpointing=True), machine
    if joint.micro_batch is not None:
        size = joint.micro_batch // 2
        while size >= 1:
            yield "micro batch", f"micro_batch = {size}", _joint(recipe, micro_batch=size), machine
            size //= 2
    batch = joint.batch // 2
    while batch >= machine.gpus:
        yield "batch", f"a batch of {batch}", _joint(recipe, batch=batch), machine
        batch //= 2
    group = recipe.control.group // 2
    while group >= 2:
        control = recipe.control.model_copy(update={"group": group})
        yield "group", f"a group of {group} rollouts", recipe.model_copy(update={"control": control}), machine
        group //= 2
    gpus = 2 * machine.gpus
    while gpus <= min(MOST_GPUS, joint.batch):
        yield "gpus", f"{gpus} GPUs", recipe, replace(machine, gpus=gpus)
        gpus *= 2
    lora = recipe.with_method("lora")
    full = recipe.model.method == "full"
    if full:
        yield "lora", "method = lora", lora, machine
    tokens = joint.max_tokens // 2
    while tokens >= max(SHORTEST_PROMPT, TEXT_TOKENS + frame_pairs(shape, joint)):
        yield "prompt", f"prompts of at most {tokens} tokens", _shorter(shape, recipe, tokens), machine
        if full:
            said = f"method = lora and prompts of at most {tokens} tokens"
            yield "lora", said, _shorter(shape, lora, tokens), machine
        tokens //= 2
    yield "memory", f"{_needed(shape, recipe, machine):.0f} GiB on each GPU", recipe, _larger(shape, recipe, machine)


def _joint(recipe: Recipe, **update: Any) -> Recipe:
    return recipe.model_copy(update={"joint": recipe.joint.model_copy(update=update)})


def _shorter(shape: ModelShape, recipe: Recipe, tokens: int) -> Recipe:
    """Return a recipe with shorter prompts, and the pixels that those leave room for."""
    joint, room = recipe.joint, tokens - TEXT_TOKENS
    unit = (shape.vision.patch * shape.vision.merge) ** 2
    pairs = frame_pairs(shape, joint)
    return _joint(
        recipe,
        max_tokens=tokens,
        max_pixels=min(joint.max_pixels, room * unit),
        video_max_pixels=min(joint.video_max_pixels, max(1, room // pairs) * unit),
        max_rationale_tokens=min(joint.max_rationale_tokens, tokens),
    )


def _needed(shape: ModelShape, recipe: Recipe, machine: Machine) -> float:
    """Return the GiB that each GPU would need for one prompt at once."""
    most = max(fit.bytes for fit in fits_all(shape, recipe, machine))
    return -(-most // GIB) / (1 - machine.reserve) + 1


def _larger(shape: ModelShape, recipe: Recipe, machine: Machine) -> Machine:
    return replace(machine, memory_gib=_needed(shape, recipe, machine))
