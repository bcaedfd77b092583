"""mmemb-deploy: embed text, images, video and documents with MMEmb-R1, reasoning only where it helps.

from mmemb_deploy import Embedder
embedder = Embedder.load()
vectors = embedder.encode(["three plus four", {"image": "photo.png"}])
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# ONNX Runtime reports usage to its vendor unless this is set before its first import; export it as "0" to opt in.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from mmemb_deploy.embedder import Embedder
    from mmemb_deploy.errors import (
        BackendError,
        BundleError,
        CertificateError,
        DeadlineError,
        InputError,
        IntegrityError,
        MissingExtraError,
        MmembError,
        OptionError,
        OverloadError,
        SchemaError,
        ServingError,
    )
    from mmemb_deploy.inputs.media import pages
    from mmemb_deploy.reasoners.remote import RemoteReasoner
    from mmemb_deploy.results import Detail, EncodeResult, Timings
    from mmemb_deploy.search.vectors import Hit, Vectors

__version__ = "0.2.0"

_HOMES = {
    "Detail": "results",
    "Embedder": "embedder",
    "EncodeResult": "results",
    "Hit": "search.vectors",
    "RemoteReasoner": "reasoners.remote",
    "Timings": "results",
    "Vectors": "search.vectors",
    "pages": "inputs.media",
} | dict.fromkeys(
    (
        "BackendError",
        "BundleError",
        "CertificateError",
        "DeadlineError",
        "InputError",
        "IntegrityError",
        "MissingExtraError",
        "MmembError",
        "OptionError",
        "OverloadError",
        "SchemaError",
        "ServingError",
    ),
    "errors",
)

__all__ = [
    "BackendError",
    "BundleError",
    "CertificateError",
    "DeadlineError",
    "Detail",
    "Embedder",
    "EncodeResult",
    "Hit",
    "InputError",
    "IntegrityError",
    "MissingExtraError",
    "MmembError",
    "OptionError",
    "OverloadError",
    "RemoteReasoner",
    "SchemaError",
    "ServingError",
    "Timings",
    "Vectors",
    "pages",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import mmemb_deploy` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmemb_deploy' has no attribute {name!r}")
    return getattr(import_module(f"mmemb_deploy.{_HOMES[name]}"), name)
