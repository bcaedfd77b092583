"""Arithmetic and hours of the four stages, for a mean example.

Hours are operations over what the GPUs do of them: peak x utilisation, counted on executed operations, recomputed ones
included. Generation takes the longer of its arithmetic and of reading weights and caches from memory; workers of the
pool that are served are counted as if these GPUs served them. No time is counted for data loading, communication that
is not hidden, evaluation, or the server of rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmemb_deploy.devices import BANDWIDTH_USE
from mmemb_deploy.figures import Figure
from mmemb_training.recipes.counts import (
    PromptSize,
    cached_values,
    forward_flops,
    generated_flops,
    layer_flops,
    mean_prompt,
    text_flops,
    vision_flops,
)
from mmemb_training.recipes.machines import Machine
from mmemb_training.recipes.settings import RunRecipe, TrainedWeights
from mmemb_training.recipes.shapes import HUB, SHAPES, ModelShape, find_shape

DECODED_HERE = "decoded here, without the copies of caches through host memory: [control.rollouts] names a server"
MOST_TOGETHER = 256  # sequences that a GPU decodes at once, where its memory holds as many; assumed


def stage_costs(
    shape: ModelShape, recipe: RunRecipe, machine: Machine, examples: int, fill: float, *, cached: bool
) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """Return the operations and the hours of the four stages, for a mean example.

    `cached`: stage 3 reads a step in parts, each of them twice.
    """
    pool, selection, joint, control = recipe.pool, recipe.selection, recipe.joint, recipe.control
    prompt, answer = mean_prompt(shape, recipe.model, fill), max(1, round(fill * pool.max_tokens))
    rationale = max(1, round(fill * recipe.model.max_rationale_tokens))
    flops: dict[str, Figure] = {}
    hours: dict[str, Figure] = {}

    def add(stage: str, dense: float, basis: str, *decoded: tuple[ModelShape, PromptSize, float]) -> None:
        """Add a stage; `decoded` says who writes, after which prompt, and how many tokens in all."""
        written = [tokens * generated_flops(writer, size) for writer, size, tokens in decoded]
        total, how = machine.hours(dense), "operations / (GPUs x peak x utilisation)"
        for arithmetic, (writer, size, tokens) in zip(map(machine.hours, written), decoded, strict=True):
            if total is not None and arithmetic is not None:
                total += max(arithmetic, _reading_hours(writer, size, tokens, machine))
        if decoded:
            tokens = sum(tokens for _, _, tokens in decoded)
            how += f"; {tokens:,.0f} generated tokens at the longer of that and of reading weights and caches"
        flops[stage] = Figure(dense + sum(written), "FLOP", basis)
        hours[stage] = Figure(total, "h", how)

    known = [one for one in pool.workers if one.model in (*HUB, *SHAPES)]
    unknown = ", ".join(one.name for one in pool.workers if one not in known)
    served = ", ".join(one.name for one in known if one.base_url is not None)
    dense, written = 0, list[tuple[ModelShape, PromptSize, float]]()
    for writer in (find_shape(one.model) for one in known):
        asked = mean_prompt(writer, recipe.model, fill).followed(0, answer)
        dense += examples * forward_flops(writer, asked)
        written.append((writer, asked, examples * pool.samples * answer))
    add(
        "1 pool",
        dense,
        f"{examples} questions x {pool.samples} samples x {answer} tokens ({fill:g} x max_tokens) by each of "
        f"{', '.join(one.name for one in known) or 'no worker'}"
        + (f"; {served}: served, and counted as if by these GPUs" if served else "")
        + (f"; {unknown}: of unknown shape, not counted" if unknown else ""),
        *written,
    )
    judge = int(selection.evaluator == "judge")  # it reads both sides in one prompt, and answers with a logit
    paths = len(pool.workers) * (pool.samples + selection.other_rationales)
    sides = 2 * (vision_flops(shape, prompt) + layer_flops(shape, prompt.tokens, prompt.tokens))
    followed = paths * layer_flops(shape, answer, prompt.tokens * (1 + judge) + answer)
    heads = judge * 2 * shape.text.embedding_parameters() * (paths + 1)
    add(
        "2 selection",
        examples * (sides + followed + heads),
        f"{selection.evaluator}, a model of this shape: {examples} x (both sides once, for each of {len(pool.workers)} "
        f"workers {pool.samples} rationales and {selection.other_rationales} of others, of {answer} tokens), forward",
    )
    steps, targets = joint.schedule.over(examples // joint.batch).length, joint.batch * (1 + joint.hard_negatives)
    queries = joint.batch, prompt.followed(1, rationale)
    step, how = _trained_flops(shape, recipe.weights_of("joint"), [queries, (targets, prompt)], cached=cached)
    counted = f"{steps} steps: {joint.batch} queries with a rationale, {targets} targets; {how}"
    add("3 joint", steps * step, counted)
    steps, group = control.schedule.length, prompt.followed(control.group, rationale)
    step, how = _trained_flops(shape, recipe.weights_of("control"), [(control.queries, group)], cached=False)
    turns = -(-steps // control.updates)
    drawn = shape, prompt.followed(0, rationale), turns * control.queries * control.group * rationale
    server = control.rollouts
    add(
        "4 control",
        turns * control.queries * (forward_flops(shape, prompt) + 2 * forward_flops(shape, group)) + steps * step,
        f"{turns} batches of {control.queries} questions x {control.group} rollouts, all of which reason ({rationale} "
        f"tokens), read by the policy and by the reference; {steps} steps, {how}; rollouts "
        + (f"by the server at {server.base_url}, not counted" if server else DECODED_HERE),
        *([] if server else [drawn]),
    )
    counted_hours = [figure.value for figure in hours.values() if figure.value is not None]
    total = sum(counted_hours) if len(counted_hours) == len(hours) else None
    hours["all"] = Figure(total, "h", "the sum; without data loading, evaluation and restarts")
    hours["all, GPU hours"] = Figure(None if total is None else total * machine.gpus, "h", f"x {machine.gpus} GPUs")
    return flops, hours


def _reading_hours(writer: ModelShape, size: PromptSize, tokens: float, machine: Machine) -> float:
    """Return the hours in which memory yields the bf16 weights and every KV cache for each token; 0 if not known."""
    if machine.bandwidth is None:
        return 0.0
    text, cached = writer.text, 2 * cached_values(writer)
    left = machine.usable_bytes - 2 * writer.parameters()
    together = max(1, min(MOST_TOGETHER, int(left // (cached * (size.tokens + size.rationale_tokens)))))
    weights = 2 * (text.layers * text.layer_parameters() + text.embedding_parameters())
    caches = together * cached * (size.tokens + size.rationale_tokens // 2)
    return tokens / machine.gpus / together * (weights + caches) / (machine.bandwidth * 1e9 * BANDWIDTH_USE) / 3600


def _trained_flops(
    shape: ModelShape, weights: TrainedWeights, read: Sequence[tuple[int, PromptSize]], *, cached: bool
) -> tuple[int, str]:
    """Return the operations of reading prompts forwards and backwards, and how they are counted."""
    text = sum(count * text_flops(shape, size) for count, size in read)
    vision = sum(count * vision_flops(shape, size) for count, size in read)
    more = (", recomputed 1" if weights.gradient_checkpointing else "") + (", GradCache 1" if cached else "")
    again = cached + weights.gradient_checkpointing
    if weights.adapters is None:
        how = f"forward (2 N per token, and attention) x {3 + again}: forward 1, backward 2{more}"
        return (3 + again) * (text + vision), how
    return (2 + again) * text + (1 + cached) * vision, (
        f"text forward x {2 + again}: forward 1, backward 1 (inputs alone: weights are frozen; the adapters' own is "
        f"left out){more}; vision forward x {1 + cached}"
    )
