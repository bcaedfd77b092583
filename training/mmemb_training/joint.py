"""The joint objective of stage 3 on DigitChain (METHOD): both paths of every query in one forward pass.

One sequence per query carries both paths, so a single pass gives the direct embedding at `<|disc_emb|>`, the decision
there, the rationale's next-token loss and the reasoned embedding at `<|gen_emb|>`:

    L = InfoNCE(z_r) + lambda_g * next-token loss on the rationale and the decision + lambda_d * InfoNCE(z_d)

The decision's label is `<think>` where the reasoned embedding ranks the pair's own target higher than the direct one
does, and stop elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmemb_deploy import prompts
from mmemb_deploy.digitchain import Candidate, DigitChain, Example
from mmemb_deploy.inputs import parse
from mmemb_deploy.rows import Row, RowEncoder, collate
from mmemb_training.batches import encode_batch
from mmemb_training.losses import info_nce, reasoning_helps
from mmemb_training.nano import NANO_PROMPT, NanoRecipe

FAMILY_SHARES = {"match": 5, "name": 4, "chain-2": 3, "chain-3": 3, "chain-4": 3, "chain-5": 3, "text": 4}
LOOKALIKES_PER_MATCH = 2  # hard negatives


@dataclass(frozen=True)
class Step:
    """A training step's examples as rows, and which candidate answers which query.

    Candidates are every query's target, then the look-alikes of the match queries.
    """

    queries: list[Row]  # each ends with its rationale's path
    prompt_lengths: list[int]
    candidates: list[Row]
    relevant_QC: Tensor


def draw_step(encoder: RowEncoder, recipe: NanoRecipe, step: int) -> Step:
    """Draw the examples of one step; a function of the recipe's seed and the step alone, so that a run can resume."""
    rng = np.random.default_rng([recipe.seed, step])
    shares = np.array(list(FAMILY_SHARES.values()), np.float64)
    counts = rng.multinomial(recipe.batch, shares / shares.sum())
    source = DigitChain("train", int(rng.integers(2**31)))
    examples = [
        example for family, count in zip(FAMILY_SHARES, counts, strict=True)
        for example in source.examples(family, int(count))
    ]  # fmt: skip
    candidates = [example.target for example in examples]
    for example in examples:
        if example.family == "match":
            lookalikes = (shown for shown in example.candidates if shown is not example.target)
            candidates += islice(lookalikes, LOOKALIKES_PER_MATCH)
    prompts_only = [encoder.row(parse(example.content), example.instruction) for example in examples]
    return Step(
        queries=[
            row.extended(encoder.prompt.rationale(example.rationale))
            for row, example in zip(prompts_only, examples, strict=True)
        ],
        prompt_lengths=[row.length for row in prompts_only],
        candidates=[encoder.row(parse(shown.content), NANO_PROMPT.document_instruction) for shown in candidates],
        relevant_QC=torch.tensor([[_answers(shown, example) for shown in candidates] for example in examples]),
    )


def _answers(candidate: Candidate, example: Example) -> bool:
    if example.family == "match":
        return candidate.drawing == example.target.drawing
    return candidate.value == example.value


def step_loss(model: Any, encoder: RowEncoder, step: Step, recipe: NanoRecipe) -> tuple[Tensor, dict[str, float]]:
    """Return the joint loss of one step and its parts."""
    ids = encoder.prompt.ids
    order = sorted(range(len(step.queries)), key=lambda place: step.queries[place].length)
    direct: list[Tensor] = [torch.empty(0)] * len(order)
    reasoned = list(direct)
    decision = list(direct)
    language = []
    for places in np.array_split(order, recipe.micro_batches):
        batch = collate([step.queries[place] for place in places], ids[prompts.PAD])
        hidden_BTD = encode_batch(model, batch, encoder.vision)
        starts = torch.tensor([step.prompt_lengths[place] - 1 for place in places])
        rows = torch.arange(len(places))
        direct_BD, reasoned_BD = hidden_BTD[rows, starts], hidden_BTD[rows, torch.from_numpy(batch.last_B)]
        decision_BV = model.lm_head(direct_BD)
        for row, place in enumerate(places):
            direct[place], reasoned[place], decision[place] = direct_BD[row], reasoned_BD[row], decision_BV[row]
        # `<think>` to the last word predict the next token, up to `</think>`; what follows is forced, not predicted.
        where = torch.arange(hidden_BTD.shape[1])
        predicts_BT = (where > starts[:, None]) & (where < torch.from_numpy(batch.last_B)[:, None] - 1)
        targets_BT = torch.from_numpy(batch.token_ids_BT).roll(-1, dims=1)
        language.append(
            F.cross_entropy(model.lm_head(hidden_BTD[predicts_BT]), targets_BT[predicts_BT], reduction="sum")
        )
    predicted = sum(row.length - start - 2 for row, start in zip(step.queries, step.prompt_lengths, strict=True))
    batch = collate(step.candidates, ids[prompts.PAD])
    candidates_CD = encode_batch(model, batch, encoder.vision)[torch.arange(len(step.candidates)), batch.last_B]
    direct_QD, reasoned_QD = torch.stack(direct), torch.stack(reasoned)
    helps_Q = reasoning_helps(direct_QD, reasoned_QD, candidates_CD, torch.arange(len(order)), step.relevant_QC)
    labels_Q = torch.where(helps_Q, ids[prompts.THINK], ids[prompts.STOP])
    parts = {
        "direct": info_nce(direct_QD, candidates_CD, step.relevant_QC, recipe.temperature, recipe.dims),
        "reasoned": info_nce(reasoned_QD, candidates_CD, step.relevant_QC, recipe.temperature, recipe.dims),
        "rationale": torch.stack(language).sum() / predicted,
        "decision": F.cross_entropy(torch.stack(decision), labels_Q),
    }
    loss = (
        parts["reasoned"]
        + recipe.lambda_g * (parts["rationale"] + parts["decision"])
        + recipe.lambda_d * parts["direct"]
    )
    return loss, {name: part.item() for name, part in parts.items()} | {"helps": helps_Q.float().mean().item()}
