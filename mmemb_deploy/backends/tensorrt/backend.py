"""TensorRT, or TensorRT for RTX, on one NVIDIA GPU: the engines that `mmemb build` made, over slots that stay there."""

from __future__ import annotations

from collections.abc import Mapping
from logging import getLogger

from mmemb_deploy.backends.cuda import Cuda, Gpu, probe
from mmemb_deploy.backends.device_session import DeviceSession
from mmemb_deploy.backends.device_vision import DeviceVision
from mmemb_deploy.backends.kv_cache.slots import Places, SlotDecoder, windows
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.backends.tensorrt.api import Library, load_library
from mmemb_deploy.backends.tensorrt.budget import budget_of
from mmemb_deploy.backends.tensorrt.engine import Arena, LoadedEngine, Stored
from mmemb_deploy.backends.tensorrt.files import EngineSet, find_set, verified_set
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.bundle.precision import FLOATS
from mmemb_deploy.errors import BackendError

LOGGER = getLogger("mmemb_deploy")


class TensorRT:
    """Loads bundles on the GPU of an index; `library` is a key of `api.LIBRARIES`.

    `unverified` engines are for the build's own check of them, and have their layers written down beside them.
    """

    def __init__(self, library: str, device: int = 0, *, unverified: bool = False) -> None:
        self._library, self._device, self._unverified = library, device, unverified

    def load(self, bundle: Bundle) -> Engine:
        """Load every engine of a bundle.

        Raises MissingExtraError; BackendError where there is no GPU, no engine for it, or too little memory.
        """
        gpu = probe(device=self._device)
        library = load_library(self._library)
        find = find_set if self._unverified else verified_set
        found, manifest = find(bundle, engines_for(library, gpu)), bundle.manifest
        check_types(manifest)
        cuda = Cuda(gpu.index)
        arena = Arena(cuda)
        engines: dict[str, LoadedEngine] = {}
        for name, graphs in found.roles(manifest).items():
            cuda.check_memory(found.engines[name].resident, f"the engine of {manifest.graphs[graphs[0]].file}")
            engine = LoadedEngine(cuda, library, Stored.read(bundle, found, name, gpu.name), arena)
            if self._unverified:
                engine.write_layers(found.path(bundle, name).with_suffix(".json"))
            engines |= dict.fromkeys(graphs, engine)
        decoder = SlotDecoder(cuda, engines, manifest, places_of(engines))
        decoder.warm_up()
        for engine in set(engines.values()):
            engine.keep_kernels()
        for line in budget_of(manifest, found, arena.nbytes).lines():
            LOGGER.info(line)
        gate = engines.get(abi.GATE)
        return Engine(
            f"{self._library} {library.version} {gpu.name}",
            DeviceVision(cuda, engines[abi.VISION], manifest),
            decoder,
            None if gate is None else DeviceSession(cuda, gate),
            tuple(decoder.notes),
        )


def places_of(engines: Mapping[str, LoadedEngine]) -> Places:
    """Return the rows and slots that a decoder's engines were built for."""
    if abi.GENERATOR not in engines:
        return Places()
    profiles, (rows, slots) = engines[abi.GENERATOR].profiles, engines[abi.GENERATOR].built.cache
    chunks = [profile[abi.TOKEN_IDS][2][1] for profile in profiles if profile[abi.TOKEN_IDS][2][0] == rows]
    return Places(rows=rows, slots=slots, padded=True, chunk=max(chunks), windows=windows(slots))


def check_types(manifest: Manifest) -> None:
    """Raise BackendError for a graph whose floats are not float32 outside of the KV cache: bytes would be misread."""
    for name, graph in manifest.graphs.items():
        for tensor in (*graph.inputs, *graph.outputs):
            cached = tensor.name.startswith(("past.", "present."))
            known = FLOATS if cached else ("float32", "int64", "uint8")
            if tensor.dtype not in known:
                raise BackendError(
                    f"the graph {name} holds {tensor.name} as {tensor.dtype}, which is not one of {', '.join(known)}: "
                    "export the bundle again"
                )


def engines_for(library: Library, gpu: Gpu) -> EngineSet:
    """Return the set, still empty, of the engines that a library builds and runs on a GPU."""
    return EngineSet(library=library.name, version=library.version, device=gpu.name, target=gpu.target, engines={})
