"""The same weights through transformers and through bundles, in one process, in turns.

Every contender runs once in each round, after a round that warms up and when the threads of the one before it have
gone to sleep; a figure is the median over the rounds. Prompts are texts, all of one length. A prompt that runs alone
in a fused bundle reuses the cache of its head, `head_tokens` long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from mmemb_benchmarks.startup import timed
from mmemb_deploy.bundle import Bundle
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import MissingExtraError
from mmemb_deploy.inputs import parse
from mmemb_deploy.rows import Row, collate

BASELINE = "transformers"
SETTLE = 0.3  # seconds after which the threads of OpenMP and ONNX Runtime have stopped spinning


@dataclass(frozen=True)
class Contender:
    """One way to run the weights: a batch of prompts to embeddings, and so many tokens written after them."""

    prefill: Callable[[Sequence[Row]], Any]
    write: Callable[[Sequence[Row], int], Any] | None  # embeds, then writes this many tokens for every row


def transformers_contender(checkpoint: Path, threads: int, dtype: str = "float32") -> Contender:
    """Run a checkpoint by transformers with SDPA, as its users do."""
    torch.set_num_threads(threads)
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa")
    model.eval()

    def inputs(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch = collate(rows, 0)
        ids_BT = torch.from_numpy(batch.token_ids_BT)
        return {"input_ids": ids_BT, "attention_mask": torch.from_numpy(batch.mask_BT)}

    @torch.inference_mode()
    def prefill(rows: Sequence[Row]) -> Any:
        hidden_BTD = model.model(**inputs(rows)).last_hidden_state
        return torch.nn.functional.normalize(hidden_BTD[:, -1].float(), dim=-1).numpy()

    @torch.inference_mode()
    def write(rows: Sequence[Row], tokens: int) -> Any:
        return model.generate(
            **inputs(rows), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    return Contender(prefill, write)


def openvino_contender(checkpoint: Path, threads: int) -> Contender:
    """Run the language model by OpenVINO, its weights compressed to 8 bits by NNCF's defaults; it only prefills.

    Raises MissingExtraError without them.
    """
    try:
        import nncf  # pyright: ignore[reportMissingImports]
        import openvino  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "openvino", "peers") from error

    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32", attn_implementation="sdpa")
    example = {
        "input_ids": torch.ones((2, 8), dtype=torch.long),
        "attention_mask": torch.ones((2, 8), dtype=torch.long),
    }
    converted = openvino.convert_model(LastState(model.model.eval()), example_input=example)
    compiled = openvino.Core().compile_model(
        nncf.compress_weights(converted), "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    )

    def prefill(rows: Sequence[Row]) -> Any:
        batch = collate(rows, 0)
        return compiled({"input_ids": batch.token_ids_BT, "attention_mask": batch.mask_BT})[0]

    return Contender(prefill, None)


class LastState(torch.nn.Module):
    """Token ids and mask, both (B, T), to embeddings (B, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed prompts of one length each."""
        hidden_BTD = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return torch.nn.functional.normalize(hidden_BTD[:, -1], dim=-1)


PEERS: dict[str, Callable[[Path, int], Contender]] = {
    BASELINE: transformers_contender,
    "transformers bfloat16": partial(transformers_contender, dtype="bfloat16"),
    "openvino 8-bit weights": openvino_contender,
}


def bundle_contender(embedder: Embedder) -> Contender:
    """Run a bundle by the runtime's own fast path and decoder."""
    fast_path, generator = embedder.pipeline.fast_path, embedder.pipeline.generator
    never: list[int] = list(embedder.manifest.markers.values())

    def choose(logits_BW: Any) -> Any:
        logits_BW[:, never] = -np.inf  # no marker ends a rationale early
        return logits_BW.argmax(axis=1)

    def write(rows: Sequence[Row], tokens: int) -> Any:
        # `<think>`, the words, `</think>` and `<|gen_emb|>` are as many steps as tokens
        return generator.generate([fast_path.run(rows).cache], tokens - 3, choose)

    return Contender(lambda rows: fast_path.run(rows).embeddings_BD, write)


def prompts(embedder: Embedder, rows: int, tokens: int, seed: int) -> list[Row]:
    """Return different texts that become exactly so many tokens each, instruction and markers included."""
    rng = np.random.default_rng(seed)
    encoder = embedder.encoder
    empty = encoder.row(parse("a"), "").length - 1
    alphabet = list("abcdefghijklmnopqrstuvwxyz")
    made = []
    for _ in range(rows):
        text = "".join(rng.choice(alphabet, size=4 * tokens))
        words = encoder.prompt.words(text)[: tokens - empty]
        row = encoder.row(parse(encoder.prompt.decode(words)), "")
        made.append(row)
    return made


def measure(
    contenders: dict[str, Contender],
    make_rows: Callable[[int, int], list[Row]],
    *,
    batches: Sequence[int],
    written: int,
    rounds: int,
    report: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Return median seconds by contender: `prefill xB`, and `token xB`, a decoded token of the whole batch."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for step in range(rounds + 1):
        for batch in batches:
            rows = make_rows(batch, step)
            for name, contender in contenders.items():
                report(f"round {step} of {rounds}, batch {batch}: {name}")
                time.sleep(SETTLE)
                found = {f"prefill x{batch}": timed(contender.prefill, rows)[1]}
                if contender.write is not None:
                    _, whole = timed(contender.write, rows, written)
                    found[f"prefill and {written} tokens x{batch}"] = whole
                    found[f"token x{batch}"] = (whole - found[f"prefill x{batch}"]) / written
                if step:
                    for what, value in found.items():
                        seconds[name].setdefault(what, []).append(value)
    return {
        name: {what: statistics.median(times) for what, times in figures.items()} for name, figures in seconds.items()
    }


def compare(
    checkpoint: Path,
    bundles: Sequence[Path],
    *,
    others: Sequence[str],
    tokens: int,
    batches: Sequence[int],
    written: int,
    rounds: int,
    threads: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a checkpoint and its bundles; ratios say how many times less than transformers a bundle takes."""
    embedders = {folder.name: Embedder.of_bundle(Bundle.open(folder), threads=threads) for folder in bundles}
    first = next(iter(embedders.values()))
    contenders = {name: PEERS[name](checkpoint, threads) for name in (BASELINE, *others)}
    contenders |= {name: bundle_contender(embedder) for name, embedder in embedders.items()}
    rows = prompts(first, 1, tokens, seed=0)
    expected_BD = contenders[BASELINE].prefill(rows)
    cosines = {name: float((contender.prefill(rows) * expected_BD).sum()) for name, contender in contenders.items()}
    seconds = measure(
        contenders, lambda batch, step: prompts(first, batch, tokens, seed=step), batches=batches,
        written=written, rounds=rounds, report=report,
    )  # fmt: skip
    ratios = {
        name: {what: seconds[BASELINE][what] / value for what, value in figures.items()}
        for name, figures in seconds.items()
        if name != BASELINE
    }
    return {
        "tokens": rows[0].length,
        "head_tokens": rows[0].head,
        "threads": threads,
        "rounds": rounds,
        "cosine": cosines,
        "seconds": seconds,
        "ratio": ratios,
    }
