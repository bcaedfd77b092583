"""Engines against ONNX Runtime in float32, on the same inputs, before anyone may load them.

Axes: N inputs, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmemb_deploy.backends.tensorrt.engine import TensorRT
from mmemb_deploy.backends.tensorrt.files import EngineSet, write_set
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import Bounds, Parity
from mmemb_deploy.embedder import Embedder, row_encoder
from mmemb_deploy.errors import CertificateError, OptionError
from mmemb_deploy.results import Detail

TEXTS = (
    "a text",
    "three plus four",
    "a much longer text, which needs many more tokens than its neighbours in the batch do, and says little with them",
)
SIZES = ((20, 20), (16, 48), (64, 24))  # height and width of images


def verification_inputs() -> list[Any]:
    """Return texts, images of several grids, several images and a video; the same ones at every call."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in SIZES]
    return [
        *TEXTS,
        *({"image": image, "text": text} for image, text in zip(images, TEXTS, strict=True)),
        {"images": images},
        {"video": images[:1] * 4, "fps": 2.0},
    ]


def compare(ours: Embedder, reference: Embedder, bounds: Bounds) -> Parity:
    """Return the agreement of two embedders of one bundle: direct, after given rationales, and after their own.

    Raises CertificateError, naming the figure that misses its bound.
    """
    inputs = verification_inputs()
    gate = reference.manifest.gate
    direct = [each.encode(inputs, reasoning="never", return_details=True) for each in (ours, reference)]
    cosines = [np.sum(direct[0].embeddings * direct[1].embeddings, axis=1)]
    flips, agreement = 0, 1.0
    if gate is not None:
        given = [each.encode(inputs, rationales=[TEXTS[1]] * len(inputs)) for each in (ours, reference)]
        own = [each.encode(inputs, reasoning="always", return_details=True) for each in (ours, reference)]
        paths = [[_rationale(detail) for detail in each.details] for each in own]
        same_N = np.array([left == right for left, right in zip(*paths, strict=True)])
        cosines += [np.sum(given[0] * given[1], axis=1), np.sum(own[0].embeddings * own[1].embeddings, axis=1)[same_N]]
        scores = [np.array([detail.gate_score for detail in each.details if detail]) for each in direct]
        flips = int(np.sum((scores[0] >= gate.threshold) != (scores[1] >= gate.threshold)))
        agreement = _agreement(paths[0], paths[1])
    cosines_N = np.concatenate(cosines)
    parity = Parity(
        inputs=len(inputs), min_cosine=float(cosines_N.min()), mean_cosine=float(cosines_N.mean()), gate_flips=flips
    )
    where = f"measured on {ours.backend} against {reference.backend}"
    if not parity.min_cosine >= bounds.min_cosine:
        raise CertificateError(f"min cosine is {parity.min_cosine}, below {bounds.min_cosine}, {where}")
    if parity.gate_flips > bounds.gate_flips:
        raise CertificateError(f"{parity.gate_flips} gate flips, above {bounds.gate_flips}, {where}")
    if not agreement >= bounds.token_agreement:
        raise CertificateError(f"token agreement is {agreement}, below {bounds.token_agreement}, {where}")
    return parity


def _rationale(detail: Detail | None) -> tuple[int, ...]:
    assert detail is not None  # only rows that failed have none, and no error was to be returned
    return tuple(detail.rationale_ids)


def _agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Return the share of choices that agree, each made after the same tokens: up to where two rationales part."""
    agreed = parted = 0
    for left, right in zip(ours, theirs, strict=True):
        same = [ours == theirs for ours, theirs in zip(left, right, strict=False)]
        agreed += (same.index(False) if False in same else len(same)) + (left == right)  # the end is a choice too
        parted += left != right
    return agreed / (agreed + parted)


def reference_bundle(bundle: Bundle, given: Bundle | None) -> Bundle:
    """Return the bundle that ONNX Runtime runs to verify engines: the given one, or the bundle itself.

    Raises OptionError where that is not in float32, or of another model.
    """
    reference = bundle if given is None else given
    for name, graph in reference.manifest.graphs.items():
        if any(tensor.dtype not in ("float32", "int64") for tensor in (*graph.inputs, *graph.outputs)) or (
            graph.precision != "float32"
        ):
            raise OptionError(
                f"the graph {name} of {reference.folder} is in {graph.precision}, and engines are verified against "
                "float32: pass --reference with a bundle that was exported from the same checkpoint in float32"
            )
    ours, theirs = bundle.manifest, reference.manifest
    models = [each.model.model_dump(exclude={"name"}) for each in (ours, theirs)]
    if models[0] != models[1] or ours.prompt != theirs.prompt:
        raise OptionError(
            f"{reference.folder} is of another model than {bundle.folder}: pass one of the same checkpoint"
        )
    return reference


def verify_engines(bundle: Bundle, engines: EngineSet, reference: Bundle) -> EngineSet:
    """Run engines that were built for this machine, unless they were verified before; write and return their parity.

    The bounds are those of the bundle's certificate. Raises BackendError, MissingExtraError where ONNX Runtime is not
    installed, and CertificateError.
    """
    if engines.parity is not None:
        return engines
    certificate = bundle.manifest.certificate
    assert certificate is not None  # an open bundle has one
    ours = Embedder(bundle.manifest, row_encoder(bundle), TensorRT(engines.flavour, unverified=True).load(bundle))
    expected = Embedder.of_bundle(reference, backend="onnxruntime")
    verified = engines.model_copy(update={"parity": compare(ours, expected, certificate.bounds)})
    write_set(bundle, verified)
    return verified
