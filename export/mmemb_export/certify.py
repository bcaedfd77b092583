"""The parity certificate: the runtime's answers against the reference's, on the same inputs and rationales."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import transformers

from mmemb_deploy.bundle.certificate import BatchParity, Bounds, Certificate
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_deploy.evaluation.parity import Answers, ReferenceSet, certificate
from mmemb_deploy.inputs.parse import parse
from mmemb_export.reference import Expected, Reference
from mmemb_training.checkpoint import Checkpoint


def certify(
    probes: Sequence[Pair], ours: Answers, batch: BatchParity, checkpoint: Checkpoint, bounds: Bounds
) -> tuple[Certificate, ReferenceSet]:
    """Compare with the reference, which reads the runtime's own rationales; return what it answered too."""
    expected = _expected(checkpoint, probes, ours)
    theirs = Answers(
        engine=f"transformers {transformers.__version__}, float32",
        direct_ND=np.stack([each.direct_D for each in expected]),
        scores_N=np.array([each.score for each in expected], np.float32),
        rationales=ours.rationales,
        reasoned_ND=None if ours.reasoned_ND is None else np.stack([each.reasoned_D for each in expected]),
    )
    agreement = 1.0
    if ours.reasoned_ND is not None:
        agreement = _token_agreement(ours, expected, frozenset(checkpoint.rows.prompt.ids.values()))
    found = certificate(probes, ours, theirs, bounds, threshold=0.5, token_agreement=agreement, batch=batch)
    return found, ReferenceSet(probes, theirs)


def _expected(checkpoint: Checkpoint, probes: Sequence[Pair], ours: Answers) -> list[Expected]:
    reference = Reference(checkpoint)
    expected = []
    for probe, rationale_ids in zip(probes, ours.rationales, strict=True):
        request = parse(probe.query, vision=checkpoint.vision)
        row = checkpoint.rows.row(request, checkpoint.instruction(probe.instruction))
        expected.append(reference.run(request, row, rationale_ids))
    return expected


def _token_agreement(ours: Answers, expected: Sequence[Expected], markers: frozenset[int]) -> float:
    """Return the share of choices that the reference would have made too: every token, and where the rationale ends.

    Any marker ends a rationale, as in `mmemb_deploy.routing.generation`.
    """
    agreed = total = 0
    for rationale_ids, truncated, each in zip(ours.rationales, ours.truncated, expected, strict=True):
        agreed += sum(mine == theirs for mine, theirs in zip(rationale_ids, each.greedy, strict=False))
        total += len(rationale_ids)
        if not truncated:
            agreed += each.greedy[len(rationale_ids)] in markers
            total += 1
    return agreed / max(total, 1)
