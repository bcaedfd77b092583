"""ONNX Runtime on an NVIDIA GPU, over portable graphs, with a KV cache that stays there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmemb_deploy.backends.cuda import Cuda, Gpu, probe
from mmemb_deploy.backends.device import Shape
from mmemb_deploy.backends.kv_cache.device import ResidentDecoder
from mmemb_deploy.backends.onnxruntime import OrtSession
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts
from mmemb_deploy.bundle.precision import value_bytes
from mmemb_deploy.errors import BackendError, MissingExtraError

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingExtraError("onnxruntime", "gpu") from error

PROVIDER = "CUDAExecutionProvider"
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no such type
TYPES: Mapping[str, Any] = {"int64": np.int64, "float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}


class OnnxRuntimeCuda:
    """Loads bundles on the first GPU; never falls back to the CPU."""

    def load(self, bundle: Bundle) -> Engine:
        """Load every graph. Raises BackendError where there is no GPU, or ONNX Runtime does not run a graph on it."""
        facts = bundle.manifest.graphs
        if facts[abi.EMBEDDER].fused:
            raise BackendError(
                f"{bundle.folder} holds fused graphs, which run on the CPU: export it with --form portable"
            )
        gpu = probe()
        cuda = Cuda()
        sessions = {name: self._open(bundle.graph(name), gpu, cuda) for name in facts}
        graphs = {name: DeviceGraph(session, facts[name]) for name, session in sessions.items()}
        return Engine(
            f"onnxruntime {onnxruntime.__version__} {gpu.name}",
            OrtSession(facts[abi.VISION].file, sessions[abi.VISION]),
            ResidentDecoder(
                cuda,
                graphs[abi.EMBEDDER],
                graphs.get(abi.GENERATOR),
                bundle.manifest.model,
                value_bytes(bundle.manifest.cache_dtype),
            ),
            OrtSession(facts[abi.GATE].file, sessions[abi.GATE]) if abi.GATE in sessions else None,
        )

    def _open(self, graph: Path, gpu: Gpu, cuda: Cuda) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        provider = PROVIDER, {"device_id": "0", "user_compute_stream": str(cuda.stream)}
        try:
            session = onnxruntime.InferenceSession(str(graph), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise BackendError(f"ONNX Runtime cannot load {graph} on {gpu.name}: {error}") from error
        if PROVIDER not in session.get_providers():  # it logs an error and runs on the CPU
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} does not run on {gpu.name}: pip uninstall onnxruntime, then "
                "pip install 'mmemb-deploy[gpu]', with the CUDA and cuDNN libraries that its release notes name"
            )
        return session


class DeviceGraph:
    """A graph as a `device.DeviceEngine`; `device` is ONNX Runtime's name of where the addresses are."""

    def __init__(self, session: Any, facts: GraphFacts, device: str = "cuda") -> None:
        self._session, self._facts, self._device = session, facts, device

    @property
    def inputs(self) -> frozenset[str]:
        """Return the names of its inputs."""
        return frozenset(tensor.name for tensor in self._facts.inputs)

    def start(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Start a run: shapes of all inputs, addresses of all inputs and outputs. Raises BackendError."""
        binding = self._session.io_binding()
        sizes: dict[str, int] = {}
        for tensor in self._facts.inputs:
            shape = shapes[tensor.name]
            sizes |= {axis: size for axis, size in zip(tensor.shape, shape, strict=True) if isinstance(axis, str)}
            binding.bind_input(tensor.name, self._device, 0, TYPES[tensor.dtype], shape, addresses[tensor.name])
        for tensor in self._facts.outputs:
            shape = resolved(tensor.shape, sizes)
            binding.bind_output(tensor.name, self._device, 0, TYPES[tensor.dtype], shape, addresses[tensor.name])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._facts.file}: {error}") from error


def resolved(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> Shape:
    """Put sizes in the place of the axes that vary; an axis may be a sum of them ("new_tokens + past_tokens")."""
    return tuple(
        axis if isinstance(axis, int) else sum(sizes[name.strip()] for name in axis.split("+")) for axis in shape
    )
