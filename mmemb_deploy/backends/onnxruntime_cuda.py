"""ONNX Runtime on an NVIDIA GPU, over portable graphs, with a KV cache that stays there. It has not run on one yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from mmemb_deploy.errors import BackendError, MissingExtraError

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingExtraError("onnxruntime", "gpu") from error

from mmemb_deploy.backends.cuda import Cuda, Gpu, probe
from mmemb_deploy.backends.device_session import DeviceSession
from mmemb_deploy.backends.device_vision import DeviceVision
from mmemb_deploy.backends.kv_cache.slots import Places, SlotDecoder
from mmemb_deploy.backends.onnxruntime import OrtGraph
from mmemb_deploy.backends.placement import check_kernels, misplaced
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts

PROVIDER: Final = "CUDAExecutionProvider"
BFLOAT16: Final = 16  # onnx.TensorProto.BFLOAT16: numpy has no such type
TYPES: Final = {name: np.dtype(name) for name in ("int64", "uint8", "float32", "float16")} | {"bfloat16": BFLOAT16}


class OnnxRuntimeCuda:
    """Loads bundles on the GPU of an index; never falls back to the CPU."""

    def __init__(self, device: int = 0) -> None:
        self._device = device

    def load(self, bundle: Bundle) -> Engine:
        """Load every graph.

        Raises BackendError where there is no GPU, or ONNX Runtime has no kernels for a graph or does not run it there.
        """
        check_kernels(bundle)
        gpu = probe(device=self._device)
        cuda = Cuda(gpu.index, extra="gpu")
        onnxruntime.preload_dlls()  # CUDA's libraries, from the packages that came with onnxruntime-gpu
        manifest = bundle.manifest
        graphs: dict[str, OrtGraph] = {}
        for names in manifest.engines.values():  # embedder and generator may be one file
            facts = manifest.graphs[names[0]]
            session = self._open(bundle.folder / facts.file, facts, gpu, cuda)
            graphs |= {name: on_device(session, manifest.graphs[name], gpu.index) for name in names}
        return Engine(
            f"onnxruntime {onnxruntime.__version__} {gpu.name}",
            DeviceVision(cuda, graphs[abi.VISION], manifest),
            SlotDecoder(cuda, graphs, manifest, Places(padded=True)),
            DeviceSession(cuda, graphs[abi.GATE]) if abi.GATE in graphs else None,
        )

    def _open(self, graph: Path, facts: GraphFacts, gpu: Gpu, cuda: Cuda) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # the CPU only computes shapes
        options.enable_mem_pattern = False  # shapes vary, and a step's memory must be there when it is recorded
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = PROVIDER, provider_options(gpu.index, cuda.stream, whole=in_slots(facts))
        try:
            # by default it opens, or runs, on the CPU what fails on the GPU
            session = onnxruntime.InferenceSession(str(graph), options, providers=[provider], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise BackendError(f"ONNX Runtime cannot load {graph} on {gpu.name}: {error}") from error
        if PROVIDER not in session.get_providers():  # it logs an error and runs on the CPU
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} does not run on {gpu.name}: pip uninstall onnxruntime "
                "onnxruntime-gpu, then pip install 'mmemb-deploy[gpu]', whose CUDA libraries need a driver for CUDA 13"
            )
        parts = session.get_provider_graph_assignment_info()
        if left := misplaced([(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()], PROVIDER):
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} leaves {', '.join(left)} of {graph} on the CPU, having no "
                "CUDA kernels for their types: export the checkpoint with --precision float16 or bfloat16"
            )
        return session


def provider_options(device: int, stream: int, *, whole: bool) -> dict[str, str]:
    """Return the options of the CUDA provider; a graph that is to be `whole` copies nothing from or to the host."""
    return {
        "device_id": str(device),
        "user_compute_stream": str(stream),
        "use_tf32": "0",  # its default multiplies float32 with 10 bits of mantissa
        "enable_cuda_graph": str(int(whole)),  # refuses others; it records nothing itself (`gpu_graph_id` below)
    }


def in_slots(facts: GraphFacts) -> bool:
    """Whether a graph's steps are recorded, which keeps what a copy from the host brought the first time."""
    return any(tensor.name == abi.START for tensor in facts.inputs)


def on_device(session: Any, facts: GraphFacts, index: int, memory: str = "cuda") -> OrtGraph:
    """Return a graph over the memory of a GPU.

    Raises BackendError for one that reads an input elsewhere: ONNX Runtime copies it when it is bound, and never again.
    """
    places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    if elsewhere := [tensor.name for tensor, place in places if place.name.lower() != memory]:
        raise BackendError(
            f"ONNX Runtime reads {', '.join(elsewhere)} of {facts.file} outside of {memory} memory, as it does where "
            "sizes are computed from it: export the checkpoint again"
        )
    options = onnxruntime.RunOptions()
    if in_slots(facts):  # others may copy from memory of the host, which is free again once a run has ended
        options.add_run_config_entry("gpu_graph_id", "-1")
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the stream keeps the order
    return OrtGraph(session, facts, (memory, index), TYPES, options)
