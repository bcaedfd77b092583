"""TensorRT, or TensorRT for RTX, on one NVIDIA GPU: the engines that `mmemb build` made, and a cache that stays there.

Axes: N images, M visual tokens of an image, D hidden size, L DeepStack levels, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.cuda import Cuda, Gpu, probe
from mmemb_deploy.backends.device import Shape, Workspace, run_engine
from mmemb_deploy.backends.kv_cache.device import ResidentDecoder
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.backends.tensorrt.api import Library, load_library
from mmemb_deploy.backends.tensorrt.engine import EngineGraph
from mmemb_deploy.backends.tensorrt.files import EngineSet, ProfileShapes, find_set, read_engine, verified_set
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.bundle.precision import FLOATS, value_bytes
from mmemb_deploy.errors import BackendError

Results = Callable[[Mapping[str, Shape]], dict[str, Shape]]  # shapes of the inputs to those of the outputs


class TensorRT:
    """Loads bundles on the first GPU; `library` is a key of `api.LIBRARIES`.

    `unverified` engines are for the build's own check of them.
    """

    def __init__(self, library: str, *, unverified: bool = False) -> None:
        self._library, self._unverified = library, unverified

    def load(self, bundle: Bundle) -> Engine:
        """Load every engine of a bundle.

        Raises MissingExtraError; BackendError where there is no GPU, no engine for it, or too little memory.
        """
        gpu = probe()
        library = load_library(self._library)
        find = find_set if self._unverified else verified_set
        found, manifest = find(bundle, engines_for(library, gpu)), bundle.manifest
        check_types(manifest)
        cuda = Cuda()
        graphs = {name: self._graph(bundle, library, found, cuda, name) for name in manifest.graphs}
        gate = graphs.get(abi.GATE)
        decoder = ResidentDecoder(
            cuda, graphs[abi.EMBEDDER], graphs.get(abi.GENERATOR), manifest.model, value_bytes(manifest.cache_dtype)
        )
        return Engine(
            f"{self._library} {library.version} {gpu.name}",
            EngineSession(cuda, graphs[abi.VISION], _vision_results(manifest)),
            decoder,
            None if gate is None else EngineSession(cuda, gate, lambda shapes: {abi.SCORE: shapes[abi.STATE][:1]}),
        )

    def _graph(self, bundle: Bundle, library: Library, engines: EngineSet, cuda: Cuda, name: str) -> EngineGraph:
        built = engines.engines[name]
        cuda.check_memory(built.size, f"the engine of the graph {name}")
        plan = read_engine(bundle, engines, name)
        return EngineGraph(cuda, library, name, plan, built.profiles, record=name == abi.GENERATOR)


def check_types(manifest: Manifest) -> None:
    """Raise BackendError for a graph whose floats are not float32 outside of the KV cache: bytes would be misread."""
    for name, graph in manifest.graphs.items():
        for tensor in (*graph.inputs, *graph.outputs):
            cached = tensor.name.startswith(("past.", "present."))
            known = FLOATS if cached else ("float32", "int64")
            if tensor.dtype not in known:
                raise BackendError(
                    f"the graph {name} holds {tensor.name} as {tensor.dtype}, which is not one of {', '.join(known)}: "
                    "export the bundle again"
                )


def engines_for(library: Library, gpu: Gpu) -> EngineSet:
    """Return the set, still empty, of the engines that a library builds and runs on a GPU."""
    return EngineSet(library=library.name, version=library.version, device=gpu.name, target=gpu.target, engines={})


class EngineSession:
    """An engine as a `protocol.Session`: arrays in host memory in and out; all outputs are float32.

    It is given no more images at once than its profiles take.
    """

    def __init__(self, cuda: Cuda, graph: EngineGraph, results: Results) -> None:
        self.graph = graph
        self._workspace, self._results = Workspace(cuda), results

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph on the inputs it declares, as often as its images need."""
        if abi.PATCHES not in inputs:
            return self._run(inputs)
        patches_NPF = inputs[abi.PATCHES]
        step = most_images(self.graph.profiles, patches_NPF.shape[1])
        starts = range(0, len(patches_NPF), step)
        parts = [self._run({**inputs, abi.PATCHES: patches_NPF[start : start + step]}) for start in starts]
        axes = {abi.VISUAL_TOKENS: 0, abi.DEEPSTACK: 1}
        return {name: np.concatenate([part[name] for part in parts], axis=axes[name]) for name in parts[0]}

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        shapes, addresses = self._workspace.upload({name: inputs[name] for name in self.graph.inputs})
        return run_engine(self.graph, self._workspace, shapes, addresses, self._results(shapes))


def _vision_results(manifest: Manifest) -> Results:
    merged = manifest.vision.merge_size**2
    hidden, levels = manifest.model.hidden_size, manifest.model.deepstack_levels

    def results(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        images, patches, _ = shapes[abi.PATCHES]
        found: dict[str, Shape] = {abi.VISUAL_TOKENS: (images, patches // merged, hidden)}
        if levels:
            found[abi.DEEPSTACK] = levels, images, patches // merged, hidden
        return found

    return results


def most_images(profiles: Sequence[ProfileShapes], patches: int) -> int:
    """Return how many images of so many patches fit one profile; 1 where none holds them, which then says so."""
    fitting = [most[0] for _, _, most in (profile[abi.PATCHES] for profile in profiles) if patches <= most[1]]
    return max(fitting, default=1)
