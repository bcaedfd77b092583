"""The requests that a benchmark sends, and an embedder that does not remember them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmemb_benchmarks.workloads import WORKLOADS, Maker
from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.embedder import Embedder, row_encoder
from mmemb_deploy.errors import OptionError, check_known
from mmemb_deploy.evaluation.digitchain import DigitChain
from mmemb_deploy.evaluation.pairs import Pair, encode_queries, read_pairs
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.jobs.files import read_source


@dataclass(frozen=True)
class Traffic:
    """Requests, and whether their candidates say which embedding is a right one."""

    pairs: Sequence[Pair]
    judged: bool
    source: str


def choose_traffic(
    bundle: Bundle,
    *,
    requests: Path | None = None,
    pairs: Path | None = None,
    workload: str | None = None,
    queries: int,
    seed: int,
) -> Traffic:
    """Read `requests` as `mmemb embed` does, or `pairs` as `mmemb calibrate` does, or draw inputs of a `workload`.

    Without any of them DigitChain's mixed traffic is drawn, over digits that no training saw. Raises OptionError for
    more than one of them, and at a malformed line.
    """
    given = {"--requests": requests, "--pairs": pairs, "--workload": workload}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise OptionError(f"{' and '.join(named)} each say what to embed: pass one of them")
    if pairs is not None:
        return Traffic(read_pairs(pairs), True, pairs.name)
    if requests is not None:
        return Traffic(_unjudged(read_source(requests).inputs), False, requests.name)
    if workload is not None:
        check_known("workload", workload, WORKLOADS)
        maker, rng = Maker(row_encoder(bundle), bundle.manifest), np.random.default_rng(seed)
        drawn = [WORKLOADS[workload](maker, rng) for _ in range(queries)]
        return Traffic(_unjudged(drawn), False, f"{workload}, seed {seed}")
    examples = DigitChain("test", seed).mixed(queries)
    return Traffic(
        [Pair.of(each) for each in examples], True, f"DigitChain, mixed traffic of the test split, seed {seed}"
    )


def _unjudged(inputs: Iterable[Any]) -> list[Pair]:
    return [Pair(query=content, candidates=[], relevant=[]) for content in inputs]


def load_forgetful(bundle: Path | None, backend: str, threads: int | None) -> tuple[Bundle, Engine]:
    """Open a bundle, the embedded one for None, so that no image's features are remembered from call to call.

    A benchmark repeats its requests, and traffic does not.
    """
    opened = Bundle.open(NANO if bundle is None else bundle)
    manifest = opened.manifest
    batch = manifest.batch.model_copy(update={"vision_bytes": 0})
    forgetful = Bundle(opened.folder, manifest.model_copy(update={"batch": batch}))
    return forgetful, choose_backend(backend, forgetful, threads)[0].load(forgetful)


def assemble(bundle: Bundle, engine: Engine) -> Embedder:
    """Return an embedder over an engine that is loaded."""
    return Embedder(bundle.manifest, row_encoder(bundle), engine)


def threshold_of_rate(embedder: Embedder, traffic: Traffic, rate: float | None) -> float | None:
    """Return the gate's threshold at which this share of the traffic reasons; None, the bundle's own, for None.

    It makes the weights of a model that was never trained behave as traffic does. Raises OptionError for a bundle that
    does not reason.
    """
    if not embedder.reasons:
        raise OptionError(f"{embedder.manifest.model.name} does not reason: it has no second route to measure")
    if rate is None:
        return None
    scores = [detail.gate_score for detail in encode_queries(embedder, traffic.pairs, reasoning="never").details]
    return float(np.quantile(scores, 1 - rate, method="higher"))


def prompt_tokens(embedder: Embedder, traffic: Traffic) -> list[int]:
    """Return the tokens of every prompt, without those of its head."""
    default = embedder.manifest.prompt.query_instruction
    rows = (
        embedder.encoder.row(
            parse(pair.query, embedder.manifest.limits), default if pair.instruction is None else pair.instruction
        )
        for pair in traffic.pairs
    )
    return [row.length - row.prefix for row in rows]
