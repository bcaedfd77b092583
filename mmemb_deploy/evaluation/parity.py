"""Agreement of one engine's answers with another's on the same inputs: what certificates are made of.

A bundle keeps some of the answers of the reference it was certified against, with the inputs, in `reference.npz`:
whoever runs it on another machine, or by another engine, can measure what holds there without the checkpoint.

Axes: N inputs, D embedding size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.bundle.certificate import BatchParity, Bounds, Certificate, Parity
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import BundleError, OptionError
from mmemb_deploy.evaluation.pairs import Pair, encode_queries
from mmemb_deploy.files import whole
from mmemb_deploy.inputs.limits import DEFAULTS
from mmemb_deploy.inputs.parse import Request, parse
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.machine import cpu_features

REFERENCE = "reference.npz"
KEPT = 32  # inputs of a certificate that a bundle keeps
KEPT_BYTES = 2 * 2**20  # of their pixels
TIE = 1e-6  # cosines that differ by less are one, whichever a CPU finds larger
BATCHED = 16  # inputs that are embedded alone and together

Rationales = Sequence[tuple[int, ...]]  # token ids, without markers


@dataclass(frozen=True)
class Answers:
    """What an engine made of some queries."""

    engine: str
    direct_ND: Floats
    scores_N: Floats  # of the gate; NaN without one
    rationales: Rationales  # that `reasoned_ND` follow
    reasoned_ND: Floats | None  # None where the model does not reason
    truncated: Sequence[bool] = ()  # which rationales the limit on tokens closed


def answer(embedder: Embedder, probes: Sequence[Pair], rationales: Rationales | None = None) -> Answers:
    """Embed the query of every probe by every route there is, after these rationales or else its own."""
    direct = encode_queries(embedder, probes, reasoning="never")
    scores_N = np.array([detail.gate_score for detail in direct.details], np.float32)
    if not embedder.reasons:
        return Answers(embedder.backend, direct.embeddings_QD, scores_N, [()] * len(probes), None)
    if rationales is None:
        reasoned = encode_queries(embedder, probes, reasoning="always")
    else:
        reasoned = encode_queries(embedder, probes, rationales=rationales)
    return Answers(
        embedder.backend,
        direct.embeddings_QD,
        scores_N,
        [detail.rationale_ids for detail in reasoned.details],
        reasoned.embeddings_QD,
        [detail.truncated for detail in reasoned.details],
    )


def certificate(
    probes: Sequence[Pair],
    ours: Answers,
    theirs: Answers,
    bounds: Bounds,
    *,
    threshold: float,
    token_agreement: float,
    batch: BatchParity,
) -> Certificate:
    """Compare answers to the same queries after the same rationales; a gate flips across the threshold."""
    kinds_N = np.array([modality(probe.query) for probe in probes])
    flips_N = (ours.scores_N >= threshold) != (theirs.scores_N >= threshold)
    cosine_N = _row_cosines(ours.direct_ND, theirs.direct_ND)
    reasoned = None
    if ours.reasoned_ND is not None and theirs.reasoned_ND is not None:
        reasoned = _parity(_row_cosines(ours.reasoned_ND, theirs.reasoned_ND), np.zeros(len(probes), bool))
    return Certificate(
        reference=theirs.engine,
        runtime=ours.engine,
        cpu=cpu_features(),
        modalities={
            str(kind): _parity(cosine_N[kinds_N == kind], flips_N[kinds_N == kind])
            for kind in dict.fromkeys(kinds_N.tolist())
        },
        reasoned=reasoned,
        token_agreement=token_agreement,
        retrieval_overlap=neighbour_overlap(ours.direct_ND, theirs.direct_ND),
        batch=batch,
        bounds=bounds,
    )


def measure(embedder: Embedder, reference: ReferenceSet, bounds: Callable[[int], Bounds]) -> Certificate:
    """Measure an embedder against a reference, under bounds for so many inputs; the caller checks what comes out."""
    probes, theirs = reference.probes, reference.answers
    ours, agreement = answer(embedder, probes, theirs.rationales), 1.0
    if ours.reasoned_ND is not None:
        own = encode_queries(embedder, probes, reasoning="always")
        agreement = agreement_until_parting([detail.rationale_ids for detail in own.details], theirs.rationales)
    gate = embedder.manifest.gate
    return certificate(
        probes,
        ours,
        theirs,
        bounds(len(probes)),
        threshold=0.5 if gate is None else gate.threshold,
        token_agreement=agreement,
        batch=batch_parity(embedder, probes),
    )


def bounds_of(bundle: Bundle) -> Callable[[int], Bounds]:
    """Return the bounds of a bundle's certificate, by how many inputs they are for."""
    known = bundle.manifest.certificate
    assert known is not None  # an open bundle has one
    flips = known.bounds.gate_flips / sum(parity.inputs for parity in known.modalities.values())
    return lambda inputs: known.bounds.model_copy(update={"gate_flips": int(flips * inputs)})


def reference_of(bundle: Bundle, against: Bundle | None = None) -> ReferenceSet:
    """Return the answers that a bundle keeps, or those of a float32 bundle of the same checkpoint to the same inputs.

    Raises BundleError where the bundle keeps none, OptionError where `against` is not in float32 or of another model.
    """
    if against is None:
        return ReferenceSet.of(bundle)
    _check_comparable(bundle, against)
    kept = REFERENCE in bundle.manifest.files
    probes = ReferenceSet.of(bundle).probes if kept else stock_probes()
    return ReferenceSet.measured(Embedder.of_bundle(against, backend="onnxruntime"), probes)


def stock_probes() -> list[Pair]:
    """Return texts, images of several grids, several images and a video; the same ones at every call."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in ((20, 20), (16, 48), (64, 24))]
    texts = "a text", "three plus four", "a much longer text, which needs many more tokens than its neighbours do"
    shown = [{"image": image, "text": text} for image, text in zip(images, texts, strict=True)]
    contents = [*texts, *shown, {"images": images}, {"video": images[:1] * 4, "fps": 2.0}]
    return [Pair(query=content, candidates=[], relevant=[]) for content in contents]


def _check_comparable(bundle: Bundle, against: Bundle) -> None:
    if against.manifest.precisions != ["float32"]:
        raise OptionError(
            f"{against.folder} is in {' and '.join(against.manifest.precisions)}: pass a --reference that was exported "
            "from the same checkpoint in float32"
        )
    ours, theirs = bundle.manifest, against.manifest
    models = [each.model.model_dump(exclude={"name"}) for each in (ours, theirs)]
    if models[0] != models[1] or ours.prompt != theirs.prompt:
        raise OptionError(f"{against.folder} is of another model than {bundle.folder}: pass one of the same checkpoint")


def batch_parity(embedder: Embedder, probes: Sequence[Pair]) -> BatchParity:
    """Embed some queries alone and together, by every route there is."""
    some = probes[:: max(1, len(probes) // BATCHED)][:BATCHED]
    cosines, equal = [], []
    for mode in ("never", "always") if embedder.reasons else ("never",):
        together = encode_queries(embedder, some, reasoning=mode, batch_size=len(some))
        for index, probe in enumerate(some):
            alone = encode_queries(embedder, [probe], reasoning=mode)
            equal.append(alone.details[0].rationale_ids == together.details[index].rationale_ids)
            if equal[-1]:
                cosines.append(_row_cosines(alone.embeddings_QD, together.embeddings_QD[index : index + 1])[0])
    return BatchParity(inputs=len(some), min_cosine=float(min(cosines)), equal_rationales=float(np.mean(equal)))


def agreement_until_parting(ours: Rationales, theirs: Rationales) -> float:
    """Return the share of choices that agree, each made after the same tokens: up to where two rationales part."""
    agreed = parted = 0
    for left, right in zip(ours, theirs, strict=True):
        same = [mine == yours for mine, yours in zip(left, right, strict=False)]
        agreed += (same.index(False) if False in same else len(same)) + (left == right)  # the end is a choice too
        parted += left != right
    return agreed / max(agreed + parted, 1)


@dataclass(frozen=True)
class ReferenceSet:
    """Inputs, and the answers to hold others against."""

    probes: Sequence[Pair]
    answers: Answers

    @classmethod
    def of(cls, bundle: Bundle) -> ReferenceSet:
        """Read what a bundle keeps. Raises BundleError for one that keeps none."""
        path = bundle.folder / REFERENCE
        if REFERENCE not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.folder} keeps no {REFERENCE}: export it again, or pass a float32 bundle of the same "
                "checkpoint as --reference"
            )
        with np.load(path, allow_pickle=False) as archive:
            facts: list[dict[str, Any]] = json.loads(archive["facts"].item())
            pixels = iter([archive[f"pixels.{index}"] for index in range(int(archive["pixels"]))])
            answers = Answers(
                archive["engine"].item(),
                archive["direct"],
                archive["scores"],
                [tuple(each["rationale_ids"]) for each in facts],
                archive.get("reasoned"),
            )
        return cls([_probe(each, pixels) for each in facts], answers)

    @classmethod
    def measured(cls, embedder: Embedder, probes: Sequence[Pair]) -> ReferenceSet:
        """Return the answers of an embedder that is to be trusted."""
        return cls(probes, answer(embedder, probes))

    def sample(self) -> ReferenceSet:
        """Return some of the inputs, drawn by a fixed lot, as many as KEPT and KEPT_BYTES allow.

        Those with a video file or a document are left out: what is kept are pictures, which become other sizes.
        """
        chosen, capacity = list[int](), KEPT_BYTES
        for index in np.random.default_rng(0).permutation(len(self.probes)).tolist():
            if _reads_file(self.probes[index].query):
                continue
            size = sum(pixels.nbytes for pixels in _pixels(parse(self.probes[index].query, DEFAULTS)))
            if len(chosen) < KEPT and size <= capacity:
                chosen.append(index)
                capacity -= size
        return self.only(sorted(chosen))

    def only(self, chosen: Sequence[int]) -> ReferenceSet:
        """Return the inputs at some places, with their answers."""
        answers, places, reasoned_ND = self.answers, list(chosen), self.answers.reasoned_ND
        kept = replace(
            answers,
            direct_ND=answers.direct_ND[places],
            scores_N=answers.scores_N[places],
            rationales=[answers.rationales[place] for place in places],
            reasoned_ND=None if reasoned_ND is None else reasoned_ND[places],
        )
        return ReferenceSet([self.probes[place] for place in places], kept)

    def write(self, folder: Path) -> None:
        """Write the inputs, as they were decoded, and the answers into a bundle's folder."""
        answers, arrays, facts = self.answers, list[NDArray[np.uint8]](), list[dict[str, Any]]()
        for probe, rationale_ids in zip(self.probes, answers.rationales, strict=True):
            request = parse(probe.query, DEFAULTS)
            arrays += _pixels(request)
            facts.append(
                {
                    "text": request.text,
                    "images": len(request.images),
                    "timestamps": request.timestamps,
                    "instruction": probe.instruction,
                    "rationale_ids": rationale_ids,
                }
            )
        columns: dict[str, Any] = {"engine": answers.engine, "direct": answers.direct_ND, "scores": answers.scores_N}
        if answers.reasoned_ND is not None:
            columns["reasoned"] = answers.reasoned_ND
        columns |= {"facts": json.dumps(facts), "pixels": len(arrays)}
        columns |= {f"pixels.{index}": array for index, array in enumerate(arrays)}
        with whole(folder / REFERENCE) as new, new.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **columns)


def _pixels(request: Request) -> list[NDArray[np.uint8]]:
    return [np.asarray(image) for image in (*request.images, *request.frames)]


def _reads_file(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    return "document" in content or isinstance(content.get("video"), (str, Path, bytes, bytearray))


def _probe(facts: dict[str, Any], pixels: Iterator[NDArray[np.uint8]]) -> Pair:
    content: dict[str, Any] = {"text": facts["text"]}
    if facts["images"]:
        content["images"] = [next(pixels) for _ in range(facts["images"])]
    if facts["timestamps"]:
        content |= {"video": [next(pixels) for _ in facts["timestamps"]], "timestamps": facts["timestamps"]}
    return Pair(query=content, candidates=[], relevant=[], instruction=facts["instruction"])


def modality(content: Any) -> str:
    """Return the modality of an input: a part of it that is not text decides."""
    if not isinstance(content, dict):
        return "text" if isinstance(content, str) else "image"
    if "video" in content:
        return "video"
    if "document" in content:
        return "images"
    if "images" in content:
        return "images" if len(content["images"]) > 1 else "image"
    return "image" if "image" in content else "text"


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


def neighbour_overlap(ours_ND: Floats, theirs_ND: Floats) -> float:
    """Return the share of rows whose nearest other row is one of those that are nearest to it in the reference too."""
    ours_NN, theirs_NN = (rows_ND @ rows_ND.T for rows_ND in (ours_ND, theirs_ND))
    for cosines_NN in (ours_NN, theirs_NN):
        np.fill_diagonal(cosines_NN, -np.inf)
    picked_N1 = np.take_along_axis(theirs_NN, ours_NN.argmax(axis=1, keepdims=True), axis=1)
    return float(np.mean(picked_N1 >= theirs_NN.max(axis=1, keepdims=True) - TIE))
