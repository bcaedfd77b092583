"""What the runtime itself costs and saves: start-up, loading and memory, time outside the graphs, the hand-off.

Start-up, loading and memory are measured in fresh processes. Of the rest all parts of a round run in turns; a figure
is the median over the rounds, after one that warms up.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmemb_benchmarks.timing import graph_seconds, run_fresh, timed
from mmemb_benchmarks.workload import Maker
from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.options import EncodeOptions

# json comes last, lest its import be missing from what a program's own imports take
PROGRAM = """
{first}
import time
began = time.perf_counter()
{code}
seconds = time.perf_counter() - began
import json, resource
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
IMPORT = "from mmemb_deploy import Embedder"
TRANSFORMERS = """
import torch
from transformers import AutoModelForImageTextToText
if {threads}:
    torch.set_num_threads({threads})
model = AutoModelForImageTextToText.from_pretrained({folder!r}, dtype="float32", attn_implementation="sdpa").eval()
with torch.inference_mode():
    model.generate(input_ids=torch.ones((1, 32), dtype=torch.long), max_new_tokens=4, do_sample=False)
"""


def measure_startup(bundle: Path, backend: str, threads: int | None, device: int = 0, *, runs: int) -> dict[str, float]:
    """Return median seconds of `import mmemb_deploy`, of the import of `Embedder`, and of `Embedder.load` after it.

    A first process warms the file cache. Raises BundleError without a bundle, OptionError for a backend.
    """
    choose_backend(backend, Bundle.open(bundle), threads, device)
    programs = {
        "import package": ("", "import mmemb_deploy"),
        "import Embedder": ("", IMPORT),
        "Embedder.load": (IMPORT, _load(bundle, backend, threads, device)),
    }
    _fresh(programs["Embedder.load"][1], 1, first=IMPORT)
    return {
        name: statistics.median(seconds for seconds, _ in _fresh(code, runs, first=first))
        for name, (first, code) in programs.items()
    }


def measure_loading(
    bundle: Path, backend: str, threads: int | None, checkpoint: Path | None, device: int = 0, *, runs: int
) -> dict[str, float]:
    """Return seconds from import to a first answer and peak bytes, in fresh processes, and the bytes of the weights.

    Raises BundleError without a bundle, OptionError for a backend.
    """
    choose_backend(backend, opened := Bundle.open(bundle), threads, device)
    load = f"{IMPORT}\nembedder = {_load(bundle, backend, threads, device)}\n"
    modes = ("never",) if opened.manifest.gate is None else ("never", "always")
    programs = {
        f"bundle, {mode}": f"{load}embedder.encode(['a text'], reasoning={mode!r}, max_rationale_tokens=4)"
        for mode in modes
    }
    if checkpoint is not None:
        programs["transformers"] = TRANSFORMERS.format(folder=str(checkpoint), threads=threads)
    found: dict[str, float] = {"weights, bytes": sum(path.stat().st_size for path in bundle.glob("*.onnx.data"))}
    for name, code in programs.items():
        seconds, peaks = zip(*_fresh(code, runs), strict=True)
        found |= {f"{name}: seconds": statistics.median(seconds), f"{name}: peak bytes": statistics.median(peaks)}
    return found


def _load(bundle: Path, backend: str, threads: int | None, device: int) -> str:
    return f"Embedder.load({str(bundle)!r}, backend={backend!r}, threads={threads}, device={device})"


def _fresh(code: str, runs: int, *, first: str = "") -> list[tuple[float, float]]:
    """Return the seconds of a program, and its process' peak bytes, run by run; `first` runs before the clock does."""
    return [run_fresh(PROGRAM.format(first=first, code=code)) for _ in range(runs)]


def measure_runtime(
    embedder: Embedder, *, tokens: int, batch: int, written: int, rounds: int, report: Callable[[str], None]
) -> dict[str, float]:
    """Return shares and ratios over calls of `encode` on `batch` texts of so many tokens, new ones in every round.

    "overhead": the share of a call that no graph took. "routed over its parts": a reasoned call over a prefill and
    `written` decoded tokens. "two passes": the practice of generating, then embedding anew, over the same parts.
    """
    maker = Maker(embedder.encoder, embedder.manifest)
    figures: defaultdict[str, list[float]] = defaultdict(list)
    for step in range(rounds + 1):
        report(f"round {step} of {rounds}")
        rng = np.random.default_rng(step)
        found = _round(embedder, [maker.text(tokens, rng) for _ in range(batch)], written)
        if step:
            for name, value in found.items():
                figures[name].append(value)
    return {name: statistics.median(values) for name, values in figures.items()}


def _round(embedder: Embedder, texts: list[str], written: int) -> dict[str, float]:
    fast_path, generator = embedder.paths.fast_path, embedder.paths.generator
    reasons: EncodeOptions = {"reasoning": "always", "max_rationale_tokens": written}
    row = Maker(embedder.encoder, embedder.manifest).row(texts[0])
    found = {
        "overhead never": _overhead(embedder, texts, {"reasoning": "never"}),
        "overhead always": _overhead(embedder, texts, reasons),
    }
    prefilled, prefill = timed(fast_path.run, [row])
    assert prefilled.cache is not None
    (reasoned,), decode = timed(generator.generate, [prefilled.cache], written)
    parts = prefill + decode
    _, routed = timed(lambda: embedder.encode(texts[:1], **reasons))
    _, again = timed(fast_path.run, [row.extended(reasoned.token_ids)])
    _, whole = timed(fast_path.run, [replace(row, prefix=0)])
    return found | {
        "prefill, seconds": prefill,
        "decode, seconds": decode,
        "tokens written": len(reasoned.token_ids),
        "routed over its parts": routed / parts,
        "two passes over the same parts": (parts + again) / parts,
        "prefill without prefix reuse over with it": whole / prefill,
        "tokens of a prompt over those after its prefix": row.length / (row.length - row.prefix),
    }


def _overhead(embedder: Embedder, texts: list[str], options: EncodeOptions) -> float:
    with graph_seconds() as spent:
        _, whole = timed(lambda: embedder.encode(texts, **options))
    return 1 - sum(spent) / whole
