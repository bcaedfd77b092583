"""The recipe of the embedded default model: a Qwen3-VL of 1.4M parameters, trained on DigitChain in one joint run.

One sequence per query carries both paths (METHOD, "Sequence"), so a single forward pass gives the direct embedding at
`<|disc_emb|>`, the decision there, the rationale's next-token loss and the reasoned embedding at `<|gen_emb|>`:

    L = InfoNCE(z_r) + lambda_g * next-token loss on the rationale and the decision + lambda_d * InfoNCE(z_d)

The decision's label is `<think>` where the reasoned embedding ranks the pair's own target higher than the direct one
does, and stop elsewhere.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mmemb_deploy import prompts
from mmemb_deploy.digitchain import (
    MATCH_INSTRUCTION,
    NAMES,
    OPERATORS,
    RESULT_INSTRUCTION,
    Candidate,
    DigitChain,
    Example,
)
from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs import Limits, parse
from mmemb_deploy.preprocess import VisionSpec
from mmemb_deploy.prompts import PromptEncoder, PromptFormat
from mmemb_deploy.rows import Row, RowEncoder, collate
from mmemb_training.batches import encode_batch
from mmemb_training.checkpoint import CheckpointFacts, save_checkpoint
from mmemb_training.losses import info_nce, reasoning_helps
from mmemb_training.tokenizer import train_tokenizer

STATE = "training_state.pt"
METRICS = "metrics.jsonl"
PIXELS = 1024  # every image becomes about 32 x 32: 4 visual tokens
VIDEO_PIXELS = 8 * PIXELS
MAX_RATIONALE_TOKENS = 48
LOOKALIKES_PER_MATCH = 2  # hard negatives
FAMILY_SHARES = {"match": 5, "name": 4, "chain-2": 3, "chain-3": 3, "chain-4": 3, "chain-5": 3, "text": 4}


@dataclass(frozen=True, kw_only=True)
class NanoRecipe:
    """Everything that decides the outcome of a run."""

    seed: int = 0
    steps: int = 1800
    batch: int = 96  # queries of a step
    learning_rate: float = 2e-3  # AdamW's, after warm-up, before cosine decay
    warmup: int = 100  # steps
    weight_decay: float = 0.05
    gradient_norm: float = 1.0  # clipped to this
    temperature: float = 0.02
    lambda_g: float = 2.0  # its loss is per token, and small beside InfoNCE's at this temperature
    lambda_d: float = 1.0
    dims: tuple[int, ...] = (128, 64)
    micro_batches: int = 4  # a step's queries, sorted by length, are padded in this many groups
    save_every: int = 200  # steps

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate", "temperature", "micro_batches", "save_every"):
            if getattr(self, name) <= 0:
                raise OptionError(f"{name} is {getattr(self, name)}: it must be positive")


def nano_config(encoder: PromptEncoder, vocabulary_size: int) -> Qwen3VLConfig:
    """Return the small config: text 128 wide, 4 layers; vision 96 wide, 2 blocks, one DeepStack level."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary_size, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2, "hidden_size": 96, "intermediate_size": 384, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 128, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=encoder.ids[prompts.IMAGE_PAD],
        video_token_id=encoder.ids[prompts.VIDEO_PAD],
        vision_start_token_id=encoder.ids[prompts.VISION_START],
        vision_end_token_id=encoder.ids[prompts.VISION_END],
        tie_word_embeddings=True,
    )  # fmt: skip


NANO_PROMPT = PromptFormat("Represent the user's input.", RESULT_INSTRUCTION, "")
NANO_VISION = VisionSpec(
    patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=PIXELS, max_pixels=PIXELS,
    video_min_pixels=VIDEO_PIXELS, video_max_pixels=VIDEO_PIXELS, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5),
    position_side=8, head_dim=24, rope_theta=10000.0,
)  # fmt: skip


def nano_tokenizer() -> Tokenizer:
    """Train the tokenizer on DigitChain's words; any other text falls back to bytes."""
    words = [MATCH_INSTRUCTION, RESULT_INSTRUCTION, NANO_PROMPT.system, "system\nuser\nassistant\n", "<0.5 seconds>"]
    words += [example.rationale for example in DigitChain("train", 0).mixed(200)]
    words += [f" {word}" for word in (*NAMES, *OPERATORS, *OPERATORS.values())] + list(NAMES)
    return train_tokenizer(words * 2, vocabulary_size=400)


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
    prompts_only = [encoder.row(parse(example.content, Limits()), example.instruction) for example in examples]
    return Step(
        queries=[
            row.extended(encoder.prompt.rationale(example.rationale))
            for row, example in zip(prompts_only, examples, strict=True)
        ],
        prompt_lengths=[row.length for row in prompts_only],
        candidates=[
            encoder.row(parse(shown.content, Limits()), NANO_PROMPT.document_instruction) for shown in candidates
        ],
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


def learning_rate(recipe: NanoRecipe, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def train_nano(folder: Path, recipe: NanoRecipe) -> Generator[dict[str, float]]:
    """Train into `folder`, yielding the metrics of every step; a folder that holds an unfinished run goes on.

    Raises OptionError if the folder's run was started with another recipe.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = nano_tokenizer()
    encoder = RowEncoder(PromptEncoder(tokenizer, NANO_PROMPT), NANO_VISION)
    model = Qwen3VLForConditionalGeneration(nano_config(encoder.prompt, tokenizer.get_vocab_size())).train()
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    plain = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    start, seconds = _resume(folder, recipe, model, optimizer)
    for step in range(start, recipe.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss, metrics = step_loss(model, encoder, draw_step(encoder, recipe, step), recipe)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of step {step} is {loss.item()}: {metrics}")
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        seconds += time.perf_counter() - began
        row = {"step": step + 1, "loss": loss.item(), **metrics, "gradient_norm": norm.item(), "seconds": seconds}
        with (folder / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            _save(folder, recipe, model, optimizer, tokenizer, encoder, step + 1, seconds)
        yield row


def _resume(folder: Path, recipe: NanoRecipe, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load an unfinished run's weights and optimizer; return the next step and the seconds spent so far."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / STATE).exists():
        (folder / METRICS).unlink(missing_ok=True)
        return 0, 0.0
    state = torch.load(folder / STATE, weights_only=True)
    if state["recipe"] != _plain(recipe):
        raise OptionError(f"{folder} holds a run with another recipe, {state['recipe']}; choose another folder")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    kept = (folder / METRICS).read_text().splitlines()[: state["step"]]
    (folder / METRICS).write_text("".join(line + "\n" for line in kept))
    return state["step"], state["seconds"]


def _save(
    folder: Path,
    recipe: NanoRecipe,
    model: Any,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    encoder: RowEncoder,
    step: int,
    seconds: float,
) -> None:
    facts = CheckpointFacts(
        prompt=NANO_PROMPT,
        dims=recipe.dims,
        max_rationale_tokens=MAX_RATIONALE_TOKENS,
        markers=encoder.prompt.ids,
        provenance={"data": "digitchain", "recipe": _plain(recipe), "step": step, "seconds": round(seconds)},
    )
    save_checkpoint(folder, model, tokenizer, facts, pixels=PIXELS, video_pixels=VIDEO_PIXELS)
    state = {
        "recipe": _plain(recipe), "step": step, "seconds": seconds,
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    torch.save(state, folder / f"{STATE}.new")
    (folder / f"{STATE}.new").replace(folder / STATE)


def _plain(recipe: NanoRecipe) -> dict[str, Any]:
    return asdict(recipe) | {"dims": list(recipe.dims)}
