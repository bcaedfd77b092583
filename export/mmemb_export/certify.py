"""The parity certificate: the runtime's answers against the reference's, on the same inputs.

Axes: N probes, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import transformers
from numpy.typing import NDArray

from mmemb_deploy.bundle.manifest import Bounds, Certificate, Parity
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import Encoded, Pair, encode_queries
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.probes import modality
from mmemb_export.reference import Expected, Reference
from mmemb_training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Answers:
    """What a runtime made of the probes' queries: without reasoning, and after a rationale each."""

    runtime: str
    probes: Sequence[Pair]
    direct: Encoded
    reasoned: Encoded | None  # None where the checkpoint does not reason


def answer(embedder: Embedder, probes: Sequence[Pair]) -> Answers:
    """Embed the query of every probe by every path there is."""
    direct = encode_queries(embedder, probes, reasoning="never")
    reasoned = encode_queries(embedder, probes, reasoning="always") if embedder.reasons else None
    return Answers(embedder.backend, probes, direct, reasoned)


def certify(answers: Answers, checkpoint: Checkpoint, bounds: Bounds) -> Certificate:
    """Compare with the reference, which reads the runtime's own rationales."""
    direct, reasoned, probes = answers.direct, answers.reasoned, answers.probes
    expected = _expected(checkpoint, probes, reasoned)
    flips_N, agreed, agreement = np.zeros(len(probes), bool), None, 1.0
    if reasoned is not None:
        flips_N = np.array(
            [each.reasons != (detail.gate_score > 0.5) for each, detail in zip(expected, direct.details, strict=True)]
        )
        reasoned_cosine_N = _row_cosines(reasoned.embeddings_QD, np.stack([each.reasoned_D for each in expected]))
        agreed = _parity(reasoned_cosine_N, np.zeros(len(probes), bool))
        agreement = _token_agreement(reasoned, expected, frozenset(checkpoint.rows.prompt.ids.values()))
    expected_direct_ND = np.stack([each.direct_D for each in expected])
    direct_cosine_N = _row_cosines(direct.embeddings_QD, expected_direct_ND)
    kinds_N = np.array([modality(probe.query) for probe in probes])
    return Certificate(
        reference=f"transformers {transformers.__version__}, float32",
        runtime=answers.runtime,
        modalities={
            str(kind): _parity(direct_cosine_N[kinds_N == kind], flips_N[kinds_N == kind])
            for kind in dict.fromkeys(kinds_N.tolist())
        },
        reasoned=agreed,
        token_agreement=agreement,
        retrieval_overlap=float(np.mean(_nearest(direct.embeddings_QD) == _nearest(expected_direct_ND))),
        bounds=bounds,
    )


def _expected(checkpoint: Checkpoint, probes: Sequence[Pair], reasoned: Encoded | None) -> list[Expected]:
    reference = Reference(checkpoint)
    rationales = [()] * len(probes) if reasoned is None else [detail.rationale_ids for detail in reasoned.details]
    expected = []
    for probe, token_ids in zip(probes, rationales, strict=True):
        request = parse(probe.query)
        row = checkpoint.rows.row(request, checkpoint.instruction(probe.instruction))
        expected.append(reference.run(request, row, token_ids))
    return expected


def _token_agreement(reasoned: Encoded, expected: Sequence[Expected], markers: frozenset[int]) -> float:
    """Return the share of choices that the reference would have made too: every token, and where the rationale ends.

    Any marker ends a rationale, as in `mmemb_deploy.routing.generation`.
    """
    agreed = total = 0
    for detail, each in zip(reasoned.details, expected, strict=True):
        token_ids = detail.rationale_ids
        agreed += sum(ours == theirs for ours, theirs in zip(token_ids, each.greedy, strict=False))
        total += len(token_ids)
        if not detail.truncated:
            agreed += each.greedy[len(token_ids)] in markers
            total += 1
    return agreed / max(total, 1)


def _row_cosines(left_ND: Floats, right_ND: Floats) -> NDArray[np.float64]:
    left, right = left_ND.astype(np.float64), right_ND.astype(np.float64)
    lengths_N = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosine_N: NDArray[np.float64] = ((left * right).sum(axis=1) / lengths_N).clip(-1, 1)
    return cosine_N


def _parity(cosine_N: NDArray[np.float64], flips_N: NDArray[np.bool_]) -> Parity:
    return Parity(
        inputs=len(cosine_N),
        min_cosine=float(cosine_N.min()),
        mean_cosine=float(cosine_N.mean()),
        gate_flips=int(flips_N.sum()),
    )


def _nearest(embeddings_ND: Floats) -> NDArray[np.int64]:
    """Return, for every row, the row of the highest cosine among the others."""
    cosines_NN = embeddings_ND @ embeddings_ND.T
    np.fill_diagonal(cosines_NN, -np.inf)
    nearest: NDArray[np.int64] = cosines_NN.argmax(axis=1)
    return nearest
