"""TensorRT, or TensorRT for RTX, on one NVIDIA GPU: the engines that `mmemb build` made, and a cache that stays there.

Axes: N images, M visual tokens of an image, D hidden size, L DeepStack levels, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.cuda import Cuda, Gpu, Graph, probe
from mmemb_deploy.backends.device import Shape, Workspace, run_engine
from mmemb_deploy.backends.kv_cache.device import VALUE_BYTES, ResidentDecoder, value_bytes
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.backends.tensorrt.api import Context, Library, LoadedEngine, load_library
from mmemb_deploy.backends.tensorrt.files import EngineSet, ProfileShapes, find_set, read_engine
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.errors import BackendError


class TensorRT:
    """Loads bundles on the first GPU; `flavour` is a key of `tensorrt_api.FLAVOURS`.

    `unverified` engines are for the build's own check of them.
    """

    def __init__(self, flavour: str, *, unverified: bool = False) -> None:
        self._flavour, self._unverified = flavour, unverified

    def load(self, bundle: Bundle) -> Engine:
        """Load every engine of a bundle.

        Raises MissingExtraError; BackendError where there is no GPU, no engine for it, or too little memory.
        """
        gpu = probe()
        library = load_library(self._flavour)
        found = find_set(bundle, engines_for(library, gpu))
        if found.parity is None and not self._unverified:
            raise BackendError(
                f"the engines in {bundle.folder} were never checked on this GPU: "
                f"run mmemb build {bundle.folder} --flavour {self._flavour}"
            )
        check_types(bundle.manifest)
        cuda = Cuda()
        facts = bundle.manifest.graphs
        graphs = {name: self._graph(bundle, library, found, cuda, name) for name in facts}
        gate = graphs.get(abi.GATE)
        decoder = ResidentDecoder(
            cuda,
            graphs[abi.EMBEDDER],
            graphs.get(abi.GENERATOR),
            bundle.manifest.model,
            value_bytes(facts[abi.EMBEDDER]),
        )
        return Engine(
            f"{self._flavour} {library.version} {gpu.name}",
            VisionSession(EngineSession(cuda, graphs[abi.VISION], _vision_results(bundle.manifest))),
            decoder,
            None if gate is None else EngineSession(cuda, gate, lambda shapes: {abi.SCORE: shapes[abi.STATE][:1]}),
        )

    def _graph(self, bundle: Bundle, library: Library, engines: EngineSet, cuda: Cuda, name: str) -> EngineGraph:
        built = engines.engines[name]
        cuda.check_memory(built.size, f"the engine of the graph {name}")
        engine = LoadedEngine(library, name, read_engine(bundle, engines, name))
        return EngineGraph(cuda, engine, built.profiles, record=name == abi.GENERATOR)


def check_types(manifest: Manifest) -> None:
    """Raise BackendError for a graph whose floats are not float32 outside of the KV cache: bytes would be misread."""
    for name, graph in manifest.graphs.items():
        for tensor in (*graph.inputs, *graph.outputs):
            cached = tensor.name.startswith(("past.", "present."))
            known = VALUE_BYTES if cached else ("float32", "int64")
            if tensor.dtype not in known:
                raise BackendError(
                    f"the graph {name} holds {tensor.name} as {tensor.dtype}, which is not one of {', '.join(known)}: "
                    "export the bundle again"
                )


def engines_for(library: Library, gpu: Gpu) -> EngineSet:
    """Return the set, still empty, of the engines that a library builds and runs on a GPU."""
    return EngineSet(flavour=library.flavour, version=library.version, device=gpu.name, target=gpu.target, engines={})


class EngineGraph:
    """An engine with a context per profile. With `record`, runs that repeat the last one start as a CUDA graph."""

    def __init__(self, cuda: Cuda, engine: LoadedEngine, profiles: Sequence[ProfileShapes], *, record: bool) -> None:
        self.profiles = profiles
        self._cuda, self._engine, self._record = cuda, engine, record
        self._runs: dict[int, _Run] = {}

    @property
    def inputs(self) -> frozenset[str]:
        """Return the names of its inputs."""
        return frozenset(self.profiles[0])

    def start(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Start a run: shapes of all inputs, addresses of all inputs and outputs. Raises BackendError."""
        place = choose_profile(self._engine.name, self.profiles, shapes)
        if place not in self._runs:
            needed = self._engine.activation_bytes(place)
            self._cuda.check_memory(needed, f"running the graph {self._engine.name} in its profile {place}")
            context = self._engine.context()
            context.set_profile(place, self._cuda.stream)
            self._runs[place] = _Run(self._cuda, context, record=self._record)
        self._runs[place].start(dict(shapes), dict(addresses))


class _Run:
    """A context and what it ran last.

    The first run of given shapes and addresses is plain, since it lets the context settle; the second is recorded.
    Other shapes or addresses end a recording, which holds for the context's state alone.
    """

    def __init__(self, cuda: Cuda, context: Context, *, record: bool) -> None:
        self._cuda, self._context, self._record = cuda, context, record
        self._bound: tuple[dict[str, Shape], dict[str, int]] | None = None
        self._graph: Graph | None = None

    def start(self, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        """Run once."""
        repeated = (shapes, addresses) == self._bound
        if not repeated:
            self._graph, self._bound = None, None
            self._context.bind(shapes, addresses)
        if repeated and self._record:
            if self._graph is None:
                self._graph = self._cuda.capture(self._enqueue)
            self._graph.launch()
        else:
            self._enqueue()
        self._bound = shapes, addresses

    def _enqueue(self) -> None:
        self._context.enqueue(self._cuda.stream)


def choose_profile(name: str, profiles: Sequence[ProfileShapes], shapes: Mapping[str, Shape]) -> int:
    """Return the place of the first profile that holds all shapes.

    Raises BackendError, naming the input that fits none and what the widest profile takes of it.
    """
    for place, profile in enumerate(profiles):
        if all(_holds(profile[tensor], shape) for tensor, shape in shapes.items()):
            return place
    tensor = next(
        (tensor for tensor, shape in shapes.items() if not any(_holds(each[tensor], shape) for each in profiles)),
        next(iter(shapes)),  # each fits some profile, together they fit none
    )
    most = [profile[tensor][2] for profile in profiles]
    raise BackendError(
        f"the engine of the graph {name} takes {tensor} of at most {' or '.join(map(str, most))}, "
        f"not {shapes[tensor]}: pass a smaller batch_size or shorter inputs, or build engines for more with "
        "`mmemb build --batch`"
    )


def _holds(bounds: tuple[Shape, Shape, Shape], shape: Shape) -> bool:
    least, _, most = bounds
    return len(shape) == len(most) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )


Results = Callable[[Mapping[str, Shape]], dict[str, Shape]]  # shapes of the inputs to those of the outputs


class EngineSession:
    """An engine as a `session.Session`: arrays in host memory in and out; all outputs are float32."""

    def __init__(self, cuda: Cuda, graph: EngineGraph, results: Results) -> None:
        self.graph = graph
        self._workspace, self._results = Workspace(cuda), results

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once, on the inputs it declares."""
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


class VisionSession:
    """The vision engine, given no more images at once than its profiles take."""

    def __init__(self, session: EngineSession) -> None:
        self._session = session

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph as often as its images need."""
        patches = inputs[abi.PATCHES]
        step = most_images(self._session.graph.profiles, patches.shape[1])
        parts = [
            self._session.run({**inputs, abi.PATCHES: patches[start : start + step]})
            for start in range(0, len(patches), step)
        ]
        axes = {abi.VISUAL_TOKENS: 0, abi.DEEPSTACK: 1}
        return {name: np.concatenate([part[name] for part in parts], axis=axes[name]) for name in parts[0]}


def most_images(profiles: Sequence[ProfileShapes], patches: int) -> int:
    """Return how many images of so many patches fit one profile; 1 where none holds them, which then says so."""
    fitting = [most[0] for _, _, most in (profile[abi.PATCHES] for profile in profiles) if patches <= most[1]]
    return max(fitting, default=1)
