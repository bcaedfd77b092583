"""ONNX Runtime on an NVIDIA GPU, over portable graphs, with a KV cache that stays there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmemb_deploy.backends.cuda import Cuda, Gpu, probe
from mmemb_deploy.backends.device_vision import DeviceVision
from mmemb_deploy.backends.kv_cache.slots import Places, SlotDecoder
from mmemb_deploy.backends.onnxruntime import OrtGraph, OrtSession
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError, MissingExtraError

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingExtraError("onnxruntime", "gpu") from error

PROVIDER = "CUDAExecutionProvider"
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no such type
TYPES: Mapping[str, Any] = {
    "uint8": np.uint8,
    "int64": np.int64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": BFLOAT16,
}


class OnnxRuntimeCuda:
    """Loads bundles on the first GPU; never falls back to the CPU."""

    def load(self, bundle: Bundle) -> Engine:
        """Load every graph. Raises BackendError where there is no GPU, or ONNX Runtime does not run a graph on it."""
        facts = bundle.manifest.graphs
        if bundle.manifest.fused:
            raise BackendError(
                f"{bundle.folder} holds fused graphs, which run on the CPU: export it with --form portable"
            )
        gpu = probe()
        cuda = Cuda()
        sessions = {name: self._open(bundle.graph(name), gpu, cuda) for name in facts}
        graphs = {name: OrtGraph(session, facts[name], ("cuda", 0), TYPES) for name, session in sessions.items()}
        return Engine(
            f"onnxruntime {onnxruntime.__version__} {gpu.name}",
            DeviceVision(cuda, graphs[abi.VISION], bundle.manifest),
            SlotDecoder(cuda, graphs, bundle.manifest, Places()),
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
