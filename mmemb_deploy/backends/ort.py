"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mmemb_deploy.errors import BackendError, MissingExtraError, OptionError

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingExtraError("onnxruntime", "cpu") from error

PROVIDER = "CPUExecutionProvider"


class OnnxRuntime:
    """Opens graphs on the CPU; `threads` is the number of threads of one operator, all cores where None."""

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads is {threads}: it must be at least 1, or None for all cores")
        self.name = f"onnxruntime {onnxruntime.__version__} CPU"
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads or 0
        self._options.log_severity_level = 3  # errors; they are raised as well

    def open(self, graph: Path) -> OrtSession:
        """Load a graph; raises BackendError if ONNX Runtime refuses it or runs it elsewhere than on the CPU."""
        try:
            session = onnxruntime.InferenceSession(str(graph), self._options, providers=[PROVIDER])
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise BackendError(f"ONNX Runtime cannot load {graph}: {error}") from error
        return OrtSession(graph.name, session)


class OrtSession:
    """One graph in ONNX Runtime."""

    def __init__(self, name: str, session: onnxruntime.InferenceSession) -> None:
        self._name = name
        self._session = session
        self._inputs = {tensor.name for tensor in session.get_inputs()}
        self._outputs = [tensor.name for tensor in session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once, on the inputs it declares."""
        try:
            values: Any = self._session.run(None, {name: inputs[name] for name in self._inputs})
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._name}: {error}") from error
        return dict(zip(self._outputs, values, strict=True))
