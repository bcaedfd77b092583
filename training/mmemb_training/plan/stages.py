"""Arithmetic and hours of the four stages, for a mean example.

Hours are operations over what the GPUs do of them: peak x utilisation, counted on executed operations, recomputed ones
included. Generation takes the longer of its arithmetic and of reading weights and caches from memory. No time is
counted for data loading, communication that is not hidden, evaluation, or servers that are not this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmemb_training.plan.arithmetic import (
    Load,
    forward_flops,
    generated_bytes,
    generated_flops,
    kv_values,
    layer_flops,
    text_flops,
    vision_flops,
)
from mmemb_training.plan.devices import Machine
from mmemb_training.plan.loads import mean_prompt, with_paths
from mmemb_training.plan.memory import GIB
from mmemb_training.plan.recipes import Recipe
from mmemb_training.plan.shapes import HUB, SHAPES, ModelShape, find_shape

MOST_TOGETHER = 256  # sequences that a GPU decodes at once, where its memory holds as many; assumed


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage costs on the machine; `hours` is None where the machine's speed is not known."""

    name: str
    flops: float
    tokens: float = 0  # generated
    elsewhere: float = 0  # tokens that an endpoint generates, whose machine is not counted
    hours: float | None
    basis: str


def stages(shape: ModelShape, recipe: Recipe, machine: Machine, examples: int, fill: float, chunks: int) -> list[Stage]:
    """Return the four stages, in order; `chunks` is in how many a GPU reads its share of a joint step."""
    return [
        _pool(recipe, machine, examples, fill),
        _selection(shape, recipe, machine, examples, fill),
        _joint(shape, recipe, machine, examples, fill, chunks),
        _control(shape, recipe, machine, fill),
    ]


def joint_steps(recipe: Recipe, examples: int) -> int:
    """Return the steps of stage 3: as set, or as many as the epochs take."""
    joint = recipe.joint
    return joint.steps if joint.steps is not None else max(1, round((joint.epochs or 0) * examples / joint.batch))


def joint_step_flops(shape: ModelShape, recipe: Recipe, fill: float, *, cached: bool) -> tuple[float, str]:
    """Return the operations of one step over all GPUs, and how they are counted."""
    joint = recipe.joint
    query = with_paths(mean_prompt(shape, joint, fill), 1, fill * joint.max_rationale_tokens)
    readings = [(joint.batch, query), (joint.batch * (1 + joint.hard_negatives), mean_prompt(shape, joint, fill))]
    total, basis = _trained(shape, recipe, readings, cached=cached)
    counted = f"{joint.batch} queries with a rationale, {readings[1][0]} targets"
    return total, f"{counted}; {basis}"


def _trained(
    shape: ModelShape, recipe: Recipe, readings: Sequence[tuple[int, Load]], *, cached: bool
) -> tuple[float, str]:
    """Return the operations of reading loads forwards and backwards, and how they are counted."""
    text = sum(count * text_flops(shape, load) for count, load in readings)
    vision = sum(count * vision_flops(shape, load) for count, load in readings)
    again = int(cached)
    recomputed = int(recipe.joint.gradient_checkpointing)
    if recipe.model.method == "full":
        factor = 3 + again + recomputed
        return factor * (text + vision), (
            f"forward (2 N per token, and attention) x {factor}: forward 1, backward 2"
            f"{', recomputed 1' if recomputed else ''}{', GradCache 1' if again else ''}"
        )
    factor = 2 + again + recomputed
    return factor * text + (1 + again) * vision, (
        f"text forward x {factor}: forward 1, backward 1 (inputs alone: weights are frozen; the adapters' own is left "
        f"out){', recomputed 1' if recomputed else ''}{', GradCache 1' if again else ''}; vision forward x {1 + again}"
    )


def _pool(recipe: Recipe, machine: Machine, examples: int, fill: float) -> Stage:
    pool = recipe.pool
    answers = examples * pool.samples
    answer = max(1.0, fill * pool.max_tokens)
    flops, hours, tokens, elsewhere = 0.0, 0.0, 0.0, 0.0
    known, remote = [], []
    for worker in pool.workers:
        if worker.base_url is not None or worker.model not in (*HUB, *SHAPES):
            elsewhere += answers * answer
            remote.append(worker.name)
            continue
        written = find_shape(worker.model)
        load = with_paths(mean_prompt(written, recipe.joint, fill), 0, answer)
        prefill = examples * forward_flops(written, load)
        flops += prefill + answers * answer * generated_flops(written, load)
        hours += _hours(prefill, machine) + _decode_hours(written, load, answers * answer, machine)
        tokens += answers * answer
        known.append(worker.name)
    basis = (
        f"{examples} questions x {pool.samples} samples x {answer:.0f} tokens ({fill:g} x max_tokens) by each of "
        f"{', '.join(known) or 'no worker here'}"
    )
    if remote:
        basis += f"; {', '.join(remote)}: on an endpoint or of unknown shape, not counted"
    return Stage(
        name="1 pool", flops=flops, tokens=tokens, elsewhere=elsewhere, hours=_known(hours, machine), basis=basis
    )


def _selection(shape: ModelShape, recipe: Recipe, machine: Machine, examples: int, fill: float) -> Stage:
    workers, selection = len(recipe.pool.workers), recipe.selection
    judge = selection.evaluator == "judge"
    paths = workers * (recipe.pool.samples + selection.foreign)
    prompt = mean_prompt(shape, recipe.joint, fill)
    words = round(fill * recipe.pool.max_tokens)
    heads = 2 * shape.text.embedding_parameters() * (paths + 1) if judge else 0
    sides = 2 * (vision_flops(shape, prompt) + layer_flops(shape, prompt.tokens, prompt.tokens))
    rationales = paths * layer_flops(shape, words, prompt.tokens * (2 if judge else 1) + words)
    flops = float(examples * (sides + heads + rationales))
    return Stage(
        name="2 selection",
        flops=flops,
        hours=_known(_hours(flops, machine), machine),
        basis=f"{selection.evaluator}, a model of this shape: {examples} x (both sides once, {workers} x "
        f"{recipe.pool.samples} candidates and {workers} x {selection.foreign} foreign rationales of {words} tokens), "
        f"forward",
    )


def _joint(shape: ModelShape, recipe: Recipe, machine: Machine, examples: int, fill: float, chunks: int) -> Stage:
    steps = joint_steps(recipe, examples)
    step, basis = joint_step_flops(shape, recipe, fill, cached=machine.gpus > 1 or chunks > 1)
    return Stage(
        name="3 joint",
        flops=steps * step,
        hours=_known(_hours(steps * step, machine), machine),
        basis=f"{steps} steps: {basis}",
    )


def _control(shape: ModelShape, recipe: Recipe, machine: Machine, fill: float) -> Stage:
    control = recipe.control
    words = max(1.0, fill * recipe.joint.max_rationale_tokens)
    prompt = mean_prompt(shape, recipe.joint, fill)
    load = with_paths(prompt, control.group, words)
    turns = -(-control.steps // control.updates)
    tokens = turns * control.queries * control.group * words
    prefill = turns * control.queries * forward_flops(shape, prompt)
    readings = 2 * turns * control.queries * forward_flops(shape, load)
    trained, how = _trained(shape, recipe, [(control.queries, load)], cached=False)
    dense = prefill + readings + control.steps * trained
    generated = generated_flops(shape, with_paths(prompt, 0, words))
    hours = _hours(dense, machine) + _decode_hours(shape, with_paths(prompt, 0, words), tokens, machine)
    return Stage(
        name="4 control",
        flops=dense + tokens * generated,
        tokens=tokens,
        hours=_known(hours, machine),
        basis=f"{turns} batches of {control.queries} questions x {control.group} rollouts, all of which reason "
        f"({words:.0f} tokens), read by the policy and by the reference; {control.steps} steps, {how}",
    )


def _known(hours: float, machine: Machine) -> float | None:
    return hours if machine.device.tflops is not None else None


def _hours(flops: float, machine: Machine) -> float:
    """Return the hours of dense arithmetic; 0 where the peak is not known, whose hours are not shown."""
    peak = machine.device.tflops
    return 0.0 if peak is None else flops / (machine.gpus * peak * 1e12 * machine.utilisation) / 3600


def _decode_hours(shape: ModelShape, load: Load, tokens: float, machine: Machine) -> float:
    """Return the hours of generating tokens, by arithmetic or by the memory's bandwidth, where that is known."""
    arithmetic = _hours(tokens * generated_flops(shape, load), machine)
    if machine.device.bandwidth is None:
        return arithmetic
    room = machine.usable_gib * GIB - 2 * shape.parameters()
    sequence = 2 * kv_values(shape) * (load.tokens + load.words)
    together = max(1, min(MOST_TOGETHER, int(room // sequence)))
    steps = tokens / machine.gpus / together
    speed = machine.device.bandwidth * 1e9 * machine.bandwidth_use
    return max(arithmetic, steps * generated_bytes(shape, load, together) / speed / 3600)
