"""Engines against the reference that their bundle was certified against, before anyone may load them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmemb_deploy.backends.tensorrt.backend import TensorRT
from mmemb_deploy.backends.tensorrt.files import EngineSet, write_set
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import BackendError
from mmemb_deploy.evaluation.parity import ReferenceSet, bounds_of, measure
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.preparer import row_encoder

PROMPTS = abi.DIRECT, abi.EMBEDDER
AXES = {  # that bound an input, and the graphs that read it
    "tokens": PROMPTS,
    "visual_tokens": PROMPTS,
    "patches": (abi.VISION,),
}


def verify_engines(bundle: Bundle, engines: EngineSet, reference: ReferenceSet, device: int = 0) -> EngineSet:
    """Run engines that were built for this machine, unless they were verified before; write down their certificate.

    They run those inputs of the reference that their profiles take, under the bounds of the bundle's certificate.
    Raises BackendError where no input fits or they do not run, CertificateError where they miss a bound.
    """
    if engines.certificate is not None:
        return engines
    probes = fitting(bundle, engines, reference)
    engine = TensorRT(engines.library, device, unverified=True).load(bundle)
    found = measure(Embedder(bundle.manifest, row_encoder(bundle), engine), probes, bounds_of(bundle))
    found.check()
    verified = engines.model_copy(update={"certificate": found})
    write_set(bundle, verified)
    return verified


def fitting(bundle: Bundle, engines: EngineSet, reference: ReferenceSet) -> ReferenceSet:
    """Return the inputs of a reference whose prompts and images engines take. Raises BackendError where none is.

    A row of the cache has room for the rationale of every such prompt (`mmemb_engines.profiles`).
    """
    encoder, instruction = row_encoder(bundle), bundle.manifest.prompt.query_instruction
    limits = {axis: _largest(bundle, engines, axis, graphs) for axis, graphs in AXES.items()}

    def fits(index: int) -> bool:
        probe = reference.probes[index]
        asked = instruction if probe.instruction is None else probe.instruction
        row = encoder.row(parse(probe.query, bundle.manifest.limits, encoder.vision), asked)
        needed = {
            "tokens": row.length,
            "visual_tokens": 1 + row.visual_tokens,  # after a row of zeros
            "patches": max((math.prod(visual.grid) for visual in row.visuals), default=0),
        }
        return all(size <= limits[axis] for axis, size in needed.items())

    chosen = [index for index in range(len(reference.probes)) if fits(index)]
    if not chosen:
        raise BackendError(
            f"none of the reference's {len(reference.probes)} inputs fits the engines in {bundle.folder}, which take "
            f"at most {', '.join(f'{size:g} {axis}' for axis, size in limits.items())}: build them from a --traffic "
            "sample with longer inputs, or without one"
        )
    return reference.only(chosen)


def _largest(bundle: Bundle, engines: EngineSet, axis: str, graphs: Sequence[str]) -> float:
    """Return the largest size of an axis that the engines of all these graphs take; infinity where none has it."""
    found = [math.inf]
    for name, roles in engines.roles(bundle.manifest).items():
        if set(roles) & set(graphs):
            inputs = [tensor for tensor in bundle.manifest.graphs[roles[0]].inputs if axis in tensor.shape]
            boxes = engines.engines[name].profiles
            found += [max(box[each.name][2][each.shape.index(axis)] for box in boxes) for each in inputs]
    return min(found)
