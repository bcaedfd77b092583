"""What the runtime asks of an engine: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from mmemb_deploy.errors import check_known

BACKENDS = ("auto", "onnxruntime")


class Session(Protocol):
    """One loaded graph."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once; raises BackendError if the engine fails."""
        ...


class Backend(Protocol):
    """Loads graphs for one engine on one device."""

    name: str  # engine, version and device, for certificates and results

    def open(self, graph: Path) -> Session:
        """Load a graph; raises BackendError if the engine refuses it."""
        ...


def choose_backend(name: str, threads: int | None) -> Backend:
    """Return the backend of that name; "auto" is ONNX Runtime. Raises OptionError, MissingExtraError."""
    check_known("backend", name, BACKENDS)
    from mmemb_deploy.backends.ort import OnnxRuntime

    return OnnxRuntime(threads)
