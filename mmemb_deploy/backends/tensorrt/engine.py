"""An engine that runs: its contexts, which share one arena for their activations.

As in `api`, a variable is called after the library's class of what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemb_deploy.backends import nvtx
from mmemb_deploy.backends.cuda import Allocation, Cuda
from mmemb_deploy.backends.device import Shape
from mmemb_deploy.backends.tensorrt.api import (
    TENSORRT_RTX,
    Library,
    can_record,
    describe_layers,
    load_engine,
    refit_engine,
    runtime_config,
    save_runtime_cache,
)
from mmemb_deploy.backends.tensorrt.files import (
    WINDOW,
    Built,
    EngineSet,
    ProfileShapes,
    kernels_path,
    read_engine,
    read_model,
)
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts
from mmemb_deploy.errors import BackendError
from mmemb_deploy.files import write_whole


@dataclass(frozen=True)
class Stored:
    """An engine on disk: its graph's tensors, how it was built, the plan, and where its compiled kernels are kept.

    `model` is what a stripped engine takes its weights from, which lie beside `graph`.
    """

    facts: GraphFacts
    built: Built
    plan: memoryview
    kernels: Path
    model: bytes | None
    graph: Path

    @classmethod
    def read(cls, bundle: Bundle, engines: EngineSet, name: str, gpu: str) -> Stored:
        """Read the engine of a name. Raises BackendError where a file of it is missing or was changed."""
        graph = bundle.manifest.engines[name][0]
        return cls(
            bundle.manifest.graphs[graph],
            engines.engines[name],
            read_engine(bundle, engines, name),
            kernels_path(bundle, engines, name, gpu),
            read_model(bundle, engines, name),
            bundle.folder / bundle.manifest.graphs[graph].file,
        )


class Arena:
    """Memory for the activations of whichever context runs: there is one stream, on which they take turns.

    Engines say what they need when they are loaded, before any of them runs.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.nbytes = 0
        self._cuda = cuda
        self._memory: Allocation | None = None

    def require(self, nbytes: int) -> None:
        """Make it at least so large."""
        assert self._memory is None, "an arena's address is in what was recorded"
        self.nbytes = max(self.nbytes, nbytes)

    @property
    def address(self) -> int:
        """Return its address. Raises BackendError where there is too little memory."""
        if self._memory is None:
            self._cuda.check_memory(self.nbytes, "the engines' activation arena")
            self._memory = self._cuda.allocate(max(self.nbytes, 1))
        return self._memory.address


class LoadedEngine:
    """An engine in device memory, as a `device.DeviceEngine`.

    A profile has one context for runs that come once, and a run that starts again and again has one of its own: what is
    recorded of it holds only while its context stays as it was. Make one only where a driver works: the library takes
    the process down otherwise.
    """

    def __init__(self, cuda: Cuda, library: Library, stored: Stored, arena: Arena) -> None:
        self.facts, self.built, self.profiles = _as_built(stored), stored.built, stored.built.profiles
        self._cuda, self._library, self._arena, self._kernels = cuda, library, arena, stored.kernels
        compatible = stored.built.options.version_compatible
        engine, self._runtime = load_engine(library, self.facts.file, stored.plan, host_code=compatible)
        if stored.model is not None:
            refit_engine(library, engine, self.facts.file, stored.model, stored.graph)
        self._engine = engine
        for index in range(len(self.profiles)):
            arena.require(int(engine.get_device_memory_size_for_profile_v2(index)))
        self._contexts: dict[int, Any] = {}  # by the index of their profile
        self._configs: dict[bool, Any] = {}  # of TensorRT for RTX, by whether a context's runs are recorded

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Return whether one profile holds inputs of these shapes; a name that is missing is not looked at."""
        return any(_holds_all(profile, shapes) for profile in self.profiles)

    def bind(
        self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], *, again: bool = False
    ) -> Callable[[], None]:
        """Return what starts a run; see `device.DeviceEngine`."""
        index = choose_profile(self.facts.file, self.profiles, shapes)
        if again:
            context = self._new_context(index, recorded=True)
        else:
            if index not in self._contexts:
                self._contexts[index] = self._new_context(index, recorded=False)
            context = self._contexts[index]
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._library.failure(f"{self.facts.file} does not take {name} of shape {shape}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._library.failure(f"{self.facts.file} does not take an address of {name}")

        def start() -> None:
            if self._cuda.recording and not can_record(self._library, context, self._cuda.stream):
                raise BackendError(f"{self._library.name} says that {self.facts.file} cannot be recorded yet")
            if not context.execute_async_v3(self._cuda.stream):
                raise self._library.failure(f"failed in the engine of {self.facts.file}")

        return start

    def write_layers(self, path: Path) -> None:
        """Write what the inspector tells of its layers, in JSON."""
        write_whole(path, describe_layers(self._library, self._engine))

    def keep_kernels(self) -> None:
        """Write the kernels that TensorRT for RTX compiled, so that the next process need not."""
        for config in list(self._configs.values())[:1]:  # they share one cache
            save_runtime_cache(config, self._kernels)

    def _new_context(self, index: int, *, recorded: bool) -> Any:
        """Return a context in a profile."""
        trt, engine, arena = self._library.trt, self._engine, self._arena
        if self._library.name == TENSORRT_RTX:
            context = engine.create_execution_context(self._config(eager=recorded))
        else:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._library.failure(f"cannot make a context of {self.facts.file}")
        if nvtx.library() is None:  # an engine that can tell of its layers marks each in every run, which takes time
            context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        context.set_device_memory(arena.address, arena.nbytes)
        if not context.set_optimization_profile_async(index, self._cuda.stream):
            raise self._library.failure(f"cannot use profile {index} of {self.facts.file}")
        return context

    def _config(self, *, eager: bool) -> Any:
        if eager not in self._configs:
            kernels = self._kernels.read_bytes() if self._kernels.is_file() else b""
            shared = self._configs.get(not eager)
            self._configs[eager] = runtime_config(self._library, self._engine, kernels, eager=eager, shared=shared)
        return self._configs[eager]


def _as_built(stored: Stored) -> GraphFacts:
    """Return a graph's tensors with what the build has added to them."""
    if WINDOW.name not in stored.built.profiles[0]:
        return stored.facts
    return stored.facts.model_copy(update={"inputs": (*stored.facts.inputs, WINDOW)})


def choose_profile(name: str, profiles: Sequence[ProfileShapes], shapes: Mapping[str, Shape]) -> int:
    """Return the index of the tightest profile that holds all shapes: its kernels were chosen for the likest ones.

    Raises BackendError, naming the input that fits none and what the widest profile takes of it.
    """
    holding = [index for index, profile in enumerate(profiles) if _holds_all(profile, shapes)]
    if holding:
        return min(holding, key=lambda index: sum(math.prod(largest) for _, _, largest in profiles[index].values()))
    tensor = next(
        (tensor for tensor, shape in shapes.items() if not any(_holds(each[tensor], shape) for each in profiles)),
        next(iter(shapes)),  # each fits some profile, together they fit none
    )
    most = [profile[tensor][2] for profile in profiles]
    raise BackendError(
        f"the engine of {name} takes {tensor} of at most {' or '.join(map(str, most))}, not {shapes[tensor]}: pass a "
        "smaller batch_size or shorter inputs, or build engines for more with `mmemb build --batch`"
    )


def _holds_all(profile: ProfileShapes, shapes: Mapping[str, Shape]) -> bool:
    return all(_holds(profile[tensor], shape) for tensor, shape in shapes.items() if tensor in profile)


def _holds(bounds: tuple[Shape, Shape, Shape], shape: Shape) -> bool:
    smallest, _, largest = bounds
    return len(shape) == len(largest) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )
