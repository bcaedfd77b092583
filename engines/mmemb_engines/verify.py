"""Engines against the reference that their bundle was certified against, before anyone may load them."""

from __future__ import annotations

from mmemb_deploy.backends.tensorrt.backend import TensorRT
from mmemb_deploy.backends.tensorrt.files import EngineSet, write_set
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.embedder import Embedder, row_encoder
from mmemb_deploy.evaluation.parity import ReferenceSet, bounds_of, measure


def verify_engines(bundle: Bundle, engines: EngineSet, reference: ReferenceSet) -> EngineSet:
    """Run engines that were built for this machine, unless they were verified before; write down their certificate.

    The bounds are those of the bundle's certificate. Raises BackendError where they do not run, CertificateError where
    they miss a bound.
    """
    if engines.certificate is not None:
        return engines
    engine = TensorRT(engines.library, unverified=True).load(bundle)
    found = measure(Embedder(bundle.manifest, row_encoder(bundle), engine), reference, bounds_of(bundle))
    found.check()
    verified = engines.model_copy(update={"certificate": found})
    write_set(bundle, verified)
    return verified
