"""What the runtime itself costs and saves: time outside the graphs, the hand-off, prefix reuse, memory and loading.

All parts of a round run in turns; a figure is the median over the rounds, after one that warms up.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mmemb_benchmarks.startup import run_fresh, timed
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.inputs.parse import parse

LOADED = """
import json, resource, time
began = time.perf_counter()
{code}
seconds = time.perf_counter() - began
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
BUNDLE = """
from pathlib import Path
from mmemb_deploy.bundle import Bundle
from mmemb_deploy.embedder import Embedder
embedder = Embedder.of_bundle(Bundle.open(Path({folder!r})), threads={threads})
embedder.encode(["a text"], reasoning={reasoning!r}, max_rationale_tokens=4)
"""
TRANSFORMERS = """
import torch
from transformers import AutoModelForImageTextToText
torch.set_num_threads({threads})
model = AutoModelForImageTextToText.from_pretrained({folder!r}, dtype="float32", attn_implementation="sdpa").eval()
with torch.inference_mode():
    model.generate(input_ids=torch.ones((1, 32), dtype=torch.long), max_new_tokens=4, do_sample=False)
"""


@contextmanager
def graph_seconds() -> Generator[list[float]]:
    """Collect the seconds of every run of a graph in ONNX Runtime."""
    spent: list[float] = []
    session: Any = onnxruntime.InferenceSession
    originals = {name: getattr(session, name) for name in ("run", "run_with_iobinding")}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = original(*arguments, **options)
            spent.append(time.perf_counter() - began)
            return result

        return run

    for name, original in originals.items():
        setattr(session, name, timed(original))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(session, name, original)


def measure_runtime(
    embedder: Embedder, texts: Callable[[int], list[str]], *, written: int, rounds: int, report: Callable[[str], None]
) -> dict[str, float]:
    """Return shares and ratios over calls of `encode` on the texts that a round's number gives.

    "overhead": the share of a call that no graph took. "routed over its parts": a reasoned call over a prefill and
    `written` decoded tokens. "two passes": the practice of generating, then embedding anew, over the same parts.
    """
    figures: defaultdict[str, list[float]] = defaultdict(list)
    for step in range(rounds + 1):
        report(f"round {step} of {rounds}")
        found = _round(embedder, texts(step), written)
        if step:
            for name, value in found.items():
                figures[name].append(value)
    return {name: statistics.median(values) for name, values in figures.items()}


def _round(embedder: Embedder, batch: list[str], written: int) -> dict[str, float]:
    fast_path, generator = embedder.pipeline.fast_path, embedder.pipeline.generator
    reasons: dict[str, Any] = {"reasoning": "always", "max_rationale_tokens": written}
    row = embedder.encoder.row(parse(batch[0]), embedder.manifest.prompt.query_instruction)
    found = {
        "overhead never": _overhead(embedder.encode, batch, reasoning="never"),
        "overhead always": _overhead(embedder.encode, batch, **reasons),
    }
    prefilled, prefill = timed(fast_path.run, [row])
    (reasoned,), decode = timed(generator.generate, [prefilled.cache], written)
    parts = prefill + decode
    _, routed = timed(embedder.encode, batch[:1], **reasons)
    _, again = timed(fast_path.run, [row.extended(reasoned.token_ids)])
    _, whole = timed(fast_path.run, [replace(row, prefix=0)])
    return found | {
        "prefill, seconds": prefill,
        "decode, seconds": decode,
        "words written": len(reasoned.token_ids),
        "routed over its parts": routed / parts,
        "two passes over the same parts": (parts + again) / parts,
        "prefill without prefix reuse over with it": whole / prefill,
        "tokens of a prompt over those after its head": row.length / (row.length - row.prefix),
    }


def measure_loading(bundle: Path, checkpoint: Path | None, *, threads: int, runs: int) -> dict[str, float]:
    """Return seconds from import to a first answer and peak bytes, in fresh processes, and the bytes of the weights."""
    programs = {"bundle, never": BUNDLE.format(folder=str(bundle), threads=threads, reasoning="never")}
    if Bundle.open(bundle).manifest.gate is not None:
        programs["bundle, always"] = BUNDLE.format(folder=str(bundle), threads=threads, reasoning="always")
    if checkpoint is not None:
        programs["transformers"] = TRANSFORMERS.format(folder=str(checkpoint), threads=threads)
    weights = sum(path.stat().st_size for path in bundle.glob("*.onnx.data"))
    found: dict[str, float] = {"weights, bytes": weights}
    for name, code in programs.items():
        each = [run_fresh(LOADED.format(code=code)) for _ in range(runs)]
        found[f"{name}: seconds"] = statistics.median(seconds for seconds, _ in each)
        found[f"{name}: peak bytes"] = statistics.median(peak for _, peak in each)
    return found


def _overhead(call: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    with graph_seconds() as spent:
        _, whole = timed(call, *arguments, **options)
    return 1 - sum(spent) / whole


def words(tokens: int, rows: int) -> Callable[[int], list[str]]:
    """Return different random texts by round; for a tokenizer of bytes they have about so many tokens."""

    def make(step: int) -> list[str]:
        rng = np.random.default_rng(step)
        return ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=tokens)) for _ in range(rows)]

    return make
