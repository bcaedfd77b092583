"""An engine that runs: a context for each of its profiles, and the runs that are recorded as CUDA graphs.

As in `api`, a variable is called after the library's class of what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmemb_deploy.backends.cuda import Cuda, CudaGraph
from mmemb_deploy.backends.device import Shape
from mmemb_deploy.backends.tensorrt.api import Library
from mmemb_deploy.backends.tensorrt.files import ProfileShapes
from mmemb_deploy.errors import BackendError


class EngineGraph:
    """An engine in device memory, a context for every profile that was used, and the runs that were recorded.

    Shapes and addresses run plainly the first time, which lets the context settle. With `record`, the second time is
    recorded as a CUDA graph, which later times start; other shapes or addresses end a recording, since it holds for
    the context's state alone. Make one only where a driver works: the library takes the process down otherwise.
    """

    def __init__(
        self, cuda: Cuda, library: Library, name: str, plan: bytes, profiles: Sequence[ProfileShapes], *, record: bool
    ) -> None:
        self.profiles = profiles
        self._cuda, self._library, self._name, self._record = cuda, library, name, record
        trt = library.trt
        library.errors.clear()
        self._runtime = runtime = trt.Runtime(library.log)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise library.failure(f"cannot load the engine {name}")
        self._engine = engine
        self._contexts: dict[int, Any] = {}  # by the index of their profile, as the other two
        self._bound: dict[int, tuple[dict[str, Shape], dict[str, int]]] = {}
        self._recorded: dict[int, CudaGraph] = {}

    @property
    def inputs(self) -> frozenset[str]:
        """Return the names of its inputs."""
        return frozenset(self.profiles[0])

    def start(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Start a run: shapes of all inputs, addresses of all inputs and outputs. Raises BackendError."""
        index = choose_profile(self._name, self.profiles, shapes)
        if index not in self._contexts:
            self._contexts[index] = self._new_context(index)
        context, bound = self._contexts[index], (dict(shapes), dict(addresses))
        repeated = self._bound.pop(index, None) == bound
        if not repeated:
            self._recorded.pop(index, None)
            self._bind(context, *bound)
        if repeated and self._record:
            if index not in self._recorded:
                self._recorded[index] = self._cuda.capture(lambda: self._enqueue(context))
            self._recorded[index].launch()
        else:
            self._enqueue(context)
        self._bound[index] = bound

    def _new_context(self, index: int) -> Any:
        """Return a context that has taken the memory and the kernels of a profile."""
        trt, engine = self._library.trt, self._engine
        needed = int(engine.get_device_memory_size_for_profile_v2(index))
        self._cuda.check_memory(needed, f"running the graph {self._name} in its profile {index}")
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        if context is None:
            raise self._library.failure(f"cannot make a context of the engine {self._name}")
        if not context.set_optimization_profile_async(index, self._cuda.stream):
            raise self._library.failure(f"cannot use profile {index} of the engine {self._name}")
        return context

    def _bind(self, context: Any, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._library.failure(f"{self._name} does not take {name} of shape {shape}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._library.failure(f"{self._name} does not take an address of {name}")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise self._library.failure(f"failed in the engine {self._name}")


def choose_profile(name: str, profiles: Sequence[ProfileShapes], shapes: Mapping[str, Shape]) -> int:
    """Return the index of the first profile that holds all shapes.

    Raises BackendError, naming the input that fits none and what the widest profile takes of it.
    """
    for index, profile in enumerate(profiles):
        if all(_holds(profile[tensor], shape) for tensor, shape in shapes.items()):
            return index
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
    smallest, _, largest = bounds
    return len(shape) == len(largest) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )
