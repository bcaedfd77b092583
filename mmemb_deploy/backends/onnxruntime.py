"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mmemb_deploy.backends.kv_cache.host import HostDecoder
from mmemb_deploy.backends.kv_cache.inplace import FusedDecoder
from mmemb_deploy.backends.protocol import Decoder, Engine
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.errors import BackendError, MissingExtraError, OptionError
from mmemb_deploy.machine import cores

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingExtraError("onnxruntime", "cpu") from error

PROVIDER = "CPUExecutionProvider"


class OnnxRuntime:
    """Loads bundles on the CPU; `threads` is the number of threads of one operator, None for a process's every core.

    ONNX Runtime by itself takes the machine's, those too that the process may not run on, and binds a thread to each.
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads is {threads}: it must be at least 1, or None for all cores")
        self.name = f"onnxruntime {onnxruntime.__version__} CPU"
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads or (0 if cores() == os.cpu_count() else cores())
        self._options.log_severity_level = 3  # errors; they are raised as well

    def load(self, bundle: Bundle) -> Engine:
        """Load every graph; raises BackendError for a float type that a CPU lacks, or if ONNX Runtime refuses one."""
        graphs = bundle.manifest.graphs
        if bundle.manifest.cache_dtype != "float32":
            raise BackendError(
                f"{bundle.folder} computes in {bundle.manifest.cache_dtype}, which ONNX Runtime does not on a CPU: run "
                "it on an NVIDIA GPU, or export the checkpoint again with --form fused"
            )
        files = {file: self._open(bundle.folder / file) for file in {facts.file for facts in graphs.values()}}
        sessions = {name: OrtSession(facts.file, files[facts.file]) for name, facts in graphs.items()}
        decoder = self._decoder(bundle.manifest, sessions[abi.EMBEDDER], sessions.get(abi.GENERATOR))
        return Engine(self.name, sessions[abi.VISION], decoder, sessions.get(abi.GATE))

    def _decoder(self, manifest: Manifest, embedder: OrtSession, generator: OrtSession | None) -> Decoder[Any]:
        model = manifest.model
        if manifest.graphs[abi.EMBEDDER].fused:
            return FusedDecoder(embedder, generator, model)
        return HostDecoder(embedder, generator, model.layers)

    def _open(self, graph: Path) -> onnxruntime.InferenceSession:
        try:
            return onnxruntime.InferenceSession(str(graph), self._options, providers=[PROVIDER])
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise BackendError(f"ONNX Runtime cannot load {graph}: {error}") from error


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

    def bind(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """Return what runs the graph once over these arrays, as they are then, and leaves its outputs in theirs.

        Arrays are contiguous. Inputs that the graph does not declare and outputs that it does not make are left out.
        """
        binding = self._session.io_binding()
        held = [*inputs.values(), *outputs.values()]  # the binding knows their addresses alone
        for name in self._inputs:
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(inputs[name]))
        for name in self._outputs:
            if name in outputs:
                binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(outputs[name]))
            else:
                binding.bind_output(name)

        def run() -> None:
            assert held
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed in {self._name}: {error}") from error

        return run
