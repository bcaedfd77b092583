"""Writes what a bundle answers on the machine that runs this, for `compare.py`: `answers.py FILE [BUNDLE]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import mmemb_deploy
from mmemb_deploy import Embedder
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.evaluation.pairs import encode_queries
from mmemb_deploy.evaluation.parity import ReferenceSet, modality, stock_probes
from mmemb_deploy.machine import cpu_features

EVERY = 16  # of the inputs that a bundle keeps, one is embedded: emulation is slow


def main(file: str, folder: str = str(NANO)) -> None:
    """Embed texts, images and a video, reasoning always and as the gate decides; write a row for each of both."""
    bundle = Bundle.open(Path(folder))
    assert bundle.manifest.certificate is not None
    embedder = Embedder.of_bundle(bundle, threads=1)
    probes = [*ReferenceSet.of(bundle).probes[::EVERY], *stock_probes()]
    vectors, rows = list[Any](), list[dict[str, Any]]()
    for mode in ("always", "auto"):
        encoded = encode_queries(embedder, probes, reasoning=mode)
        vectors.append(encoded.embeddings_QD)
        for number, (probe, detail) in enumerate(zip(probes, encoded.details, strict=True)):
            answer = {"route": detail.route, "rationale_ids": detail.rationale_ids, "score": detail.gate_score}
            rows.append({"mode": mode, "input": f"{modality(probe.query)} {number}"} | answer)
    facts = {
        "rows": rows,
        "least_cosine": bundle.manifest.certificate.bounds.min_cosine,
        "cpu": cpu_features(),
        "package": mmemb_deploy.__file__,
        "notes": embedder.notes,
    }
    np.savez(file, allow_pickle=False, embeddings=np.concatenate(vectors), facts=json.dumps(facts))


main(*sys.argv[1:])
