"""Plans that run: engines, and contexts that hold them to the order and the bounds of their profiles."""

# What the classes share is private, since the real ones show nothing of it.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import threading
import time
import weakref
from typing import Any

import numpy as np

from fakegpu import machine
from fakegpu.graphs import Graph
from fakegpu.machine import CudaError, Machine, Run, Work, alive
from fakegpu.memory import ALIGNMENT, NOTHING, MisuseError, Span, kind_of
from tensorrt.api import VERSION, Strict, enumeration, listed, release
from tensorrt.build import ProfilingVerbosity, read_plan, type_of
from tensorrt.log import ILogger, report

ExecutionContextAllocationStrategy = enumeration("ExecutionContextAllocationStrategy")
LayerInformationFormat = enumeration("LayerInformationFormat")
TensorIOMode = enumeration("TensorIOMode")
Shape = tuple[int, ...]


@listed
class Runtime(Strict):
    """Loads plans of its own version, and version-compatible ones of earlier ones, on the device that is current."""

    engine_host_code_allowed: bool = False

    def __init__(self, logger: ILogger) -> None:
        machine()
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        gpu, found = machine(), read_plan(bytes(serialized_engine))
        if found is None:
            return self._refuse("the magic tag does not match")
        header, content = found
        lasts = header["compatible"] and release(header["version"]) < release(VERSION)
        if header["device"] != gpu.name or not (lasts or header["version"] == VERSION):
            return self._refuse(f"the plan is of TensorRT {header['version']} on {header['device']}")
        if header["compatible"] and not self.engine_host_code_allowed:
            return self._refuse("the plan holds code for the host, and engine_host_code_allowed is not set")
        if gpu.fails("deserialize") or not gpu.memory.take(header["size"]):
            return self._refuse("out of memory")
        gpu.count(deserialized=1)
        return ICudaEngine(gpu, self._logger, header, content)

    def _refuse(self, why: str) -> ICudaEngine | None:
        report(self._logger, f"IRuntime::deserializeCudaEngine: {why}")
        return None


@listed
class ICudaEngine(Strict):
    """A graph, its profiles and its weights in device memory."""

    def __init__(self, gpu: Machine, logger: ILogger, header: dict[str, Any], content: bytes) -> None:
        self._gpu, self._logger, self._graph = gpu, logger, Graph.of(content)
        self._device, self._name = gpu.device, str(header["name"])
        self._refittable, self._identical = bool(header["refittable"]), bool(header["identical"])
        self._built_with: dict[str, str] = header["stripped"]  # the hashes of weights that the plan lacks
        self._lacking = set(self._built_with)
        self._queued = 0  # runs that are still to come
        self._verbosity = ProfilingVerbosity[header["verbosity"]]
        self._profiles: list[dict[str, list[Shape]]] = [
            {name: [tuple(shape) for shape in shapes] for name, shapes in profile.items()}
            for profile in header["profiles"]
        ]
        weakref.finalize(self, gpu.memory.give, header["size"]).atexit = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def refittable(self) -> bool:
        return self._refittable

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_layers(self) -> int:
        return len(self._graph.model.graph.node)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(len(self._profiles))))

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Return something that grows with the profile's ids and masks."""
        largest = [shapes[2] for shapes in self._profiles[profile_index].values()]
        ids = [shapes[2] for name, shapes in self._profiles[profile_index].items() if self._is_int(name)]
        return ALIGNMENT * -(-16 * max(int(np.prod(shape)) for shape in ids or largest) // ALIGNMENT)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        if name not in self._tensors:
            return TensorIOMode.NONE
        return TensorIOMode.INPUT if name in self._graph.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return type_of(self._tensors[name].elem_type)

    def get_tensor_shape(self, name: str) -> Shape:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self._tensors[name].dims)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        return self._profiles[profile_index][name]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._graph.aliases.get(name)

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext | None:
        self._check_device("a context")
        strategies = ExecutionContextAllocationStrategy
        strategy = strategies.STATIC if strategy is None else strategies(strategy)
        context = None if self._gpu.fails("context") else IExecutionContext(self, strategy)
        if context is None or not context._profile_memory():
            report(self._logger, "ICudaEngine::createExecutionContext: out of memory")
            return None
        return context

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def _check_device(self, what: str) -> None:
        """Refuse what a thread asks of an engine while another device is current in it."""
        if self._gpu.device != self._device:
            self._gpu.misuse(f"{what} of {self._name}, which is on device {self._device}, on device {self._gpu.device}")

    @property
    def _tensors(self) -> dict[str, Any]:
        return self._graph.inputs | self._graph.outputs

    def _is_int(self, name: str) -> bool:
        return bool(self._graph.inputs[name].dtype == np.int64)


@listed
class EngineInspector(Strict):
    """Names the layers of an engine."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:  # noqa: A002 - the library's name
        if format is not LayerInformationFormat.JSON:
            raise NotImplementedError("the fake's inspector speaks JSON alone")
        return json.dumps({"Layers": [node.name for node in self._engine._graph.model.graph.node]})


@listed
class IExecutionContext(Strict):
    """One way of running an engine: a profile, then shapes, then addresses, then runs; by one thread at a time."""

    def __init__(self, engine: ICudaEngine, strategy: Any) -> None:
        self._engine, self._strategy, self._gpu = engine, strategy, engine._gpu
        self._profile, self._verbosity = 0, engine._verbosity
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._arena: tuple[int, int] | None = None
        self._state = 0  # counts changes: a recording holds for one state
        self._settled = False  # has run since its shapes or profile changed
        self._thread: int | None = None  # which prepares a run
        self._held = [0]  # bytes of its own
        weakref.finalize(self, lambda memory, held: memory.give(held[0]), self._gpu.memory, self._held).atexit = False

    @property
    def engine(self) -> ICudaEngine:
        return self._engine

    @property
    def nvtx_verbosity(self) -> Any:
        return self._verbosity

    @nvtx_verbosity.setter
    def nvtx_verbosity(self, verbosity: Any) -> None:
        if not isinstance(verbosity, ProfilingVerbosity):
            raise TypeError("nvtx_verbosity: incompatible function arguments")
        self._verbosity = verbosity

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._enter()
        if self._gpu.stream(stream_handle).capture is not None:
            return self._spoil(stream_handle, "a profile cannot be set while capturing")
        if not 0 <= profile_index < len(self._engine._profiles):
            return self._refuse(f"there is no profile {profile_index}")
        self._profile, self._shapes = profile_index, {}
        self._change(settled=False)
        return self._profile_memory() or self._refuse("out of memory")

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._enter()
        tensor = self._engine._graph.inputs.get(name)
        if tensor is None:
            return self._refuse(f"{name} is no input")
        shape = tuple(int(size) for size in shape)
        low, _, high = self._engine._profiles[self._profile].get(name, [self._engine.get_tensor_shape(name)] * 3)
        if len(shape) != len(high):
            return self._refuse(f"{name} has {len(high)} axes, not {len(shape)}")
        for axis, (least, size, most) in enumerate(zip(low, shape, high, strict=True)):
            if not least <= size <= most:
                return self._refuse(
                    f"Supplied binding dimension {shape} for input tensor {name} exceed min ~ max range at index "
                    f"{axis}, maximum dimension in profile is {most}, minimum dimension in profile is {least}, but "
                    f"supplied dimension is {size}"
                )
        if self._shapes.get(name) != shape:
            self._shapes[name] = shape
            self._change(settled=False)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._enter()
        if name not in self._engine._tensors:
            return self._refuse(f"{name} is no tensor of this engine")
        if self._addresses.get(name) != memory:
            self._addresses[name] = int(memory)
            self._change(settled=self._settled)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> Shape:
        return self._known_shapes().get(name) or (-1,) * len(self._engine._tensors[name].dims)

    def infer_shapes(self) -> list[str]:
        return [
            name
            for name, tensor in self._engine._graph.inputs.items()
            if name not in self._shapes and tensor.shape({}) is None
        ]

    def set_device_memory(self, memory: int, size: int) -> None:
        self._enter()
        if self._strategy != ExecutionContextAllocationStrategy.USER_MANAGED:
            raise MisuseError("set_device_memory on a context that manages its own memory")
        if self._arena != (memory, size):
            self._arena = memory, size
            self._change(settled=self._settled)

    def update_device_memory_size_for_shapes(self) -> int:
        return self._engine.get_device_memory_size_for_profile_v2(self._profile)

    def execute_async_v3(self, stream_handle: int) -> bool:
        time.sleep(0)  # the library lets other threads run
        with self._gpu.lock:
            try:
                self._enter()
                done = self._enqueue(stream_handle)
            except MisuseError as error:
                self._gpu.misuses.append(str(error))
                raise
            except CudaError as error:
                done = self._refuse(f"Cuda Runtime ({error})")
            self._thread = None
            return done

    def _enqueue(self, stream_handle: int) -> bool:
        gpu, stream = self._gpu, self._gpu.stream(stream_handle)
        if (error := gpu.errors.get(threading.get_ident())) is not None:
            return self._refuse(f"Cuda Runtime ({error}, which was there before and nobody cleared)")
        if gpu.fails("enqueue"):
            return self._refuse("Cuda Runtime (an illegal memory access was encountered)")
        if missing := self.infer_shapes():
            return self._refuse(f"shapes are not set: {', '.join(missing)}")
        if missing := [name for name in self._engine._tensors if not self._addresses.get(name)]:
            return self._refuse(f"addresses are not set: {', '.join(missing)}")
        if stream.capture is not None:
            if gpu.fails("capture"):
                return self._spoil(stream_handle, "Cuda Runtime (operation not permitted when stream is capturing)")
            if not self._settled:
                return self._spoil(stream_handle, "the first run after shapes changed cannot be captured")
        if engine_lacks := self._engine._lacking:
            raise MisuseError(f"a run of {self._engine._name}, which was never filled with {len(engine_lacks)} weights")
        self._engine._check_device("a run")
        work = self._work()
        if work is None:
            return False
        gpu.push(stream, work)
        gpu.count(enqueues=1, marked_enqueues=int(self._verbosity is not ProfilingVerbosity.NONE))
        self._settled = self._settled or stream.capture is None
        return True

    def _work(self) -> Work | None:
        """Return a run with the shapes and addresses of now, or None where the library refuses them."""
        engine, shapes = self._engine, self._known_shapes()
        what = f"a run of {engine._name}"
        spans: dict[str, Span] = {}
        for name, tensor in engine._tensors.items():
            address, shape = self._addresses[name], shapes.get(name)
            if shape is None:
                raise NotImplementedError(f"the fake knows no shape of the output {name}, which is {tensor.dims}")
            if address % ALIGNMENT:
                raise MisuseError(f"{what}: the address of {name} is not aligned to {ALIGNMENT}")
            nbytes = int(np.prod(shape)) * tensor.dtype.itemsize
            spans[name] = self._gpu.span(engine._device, address, nbytes, f"{what}: {name}")
        for name, source in engine._graph.aliases.items():
            if self._addresses[name] != self._addresses[source]:
                self._refuse(f"{name} is written in place: its address must be that of {source}")
                return None
        for name in engine._graph.outputs:
            for other in engine._tensors:
                if other not in (name, engine._graph.aliases.get(name)) and spans[name].overlaps(spans[other]):
                    raise MisuseError(f"{what}: {name} overlaps {other}")
        if (arena := self._find_arena(what)) is not None:
            spans[""] = arena
        context, state, count = weakref.ref(self), self._state, self._gpu.tally

        def start() -> Run:
            this = context()
            if this is None:
                raise MisuseError(f"{what} was recorded from a context that is gone")
            if this._state != state:
                raise MisuseError(f"{what} was recorded before its context changed")
            counting = count()
            engine._queued += 1
            return lambda: _run(engine, shapes, spans, what, counting, context)

        return Work(what, start, {"runs": 1, f"runs_{engine._name}": 1})

    def _find_arena(self, what: str) -> Span | None:
        if self._strategy != ExecutionContextAllocationStrategy.USER_MANAGED:
            return None
        needed = self._engine.get_device_memory_size_for_profile_v2(self._profile)
        if self._arena is None or self._arena[1] < needed or self._arena[0] % ALIGNMENT:
            raise MisuseError(f"{what} needs {needed} bytes of device memory, and was given {self._arena}")
        return self._gpu.span(self._engine._device, self._arena[0], needed, f"{what}: its device memory")

    def _known_shapes(self) -> dict[str, Shape]:
        graph = self._engine._graph
        sizes: dict[str, int] = {}
        for name, shape in self._shapes.items():
            for dim, size in zip(graph.inputs[name].dims, shape, strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise MisuseError(f"{self._engine._name}: {dim} is {sizes[dim]} and, in {name}, {size}")
        shapes = {name: tensor.shape(sizes) for name, tensor in self._engine._tensors.items()} | self._shapes
        return {name: shape for name, shape in shapes.items() if shape is not None}

    def _profile_memory(self) -> bool:
        """Take the memory that the strategy asks for, giving back what was held."""
        strategies, engine = ExecutionContextAllocationStrategy, self._engine
        needed = {
            strategies.STATIC: engine.device_memory_size_v2,
            strategies.ON_PROFILE_CHANGE: engine.get_device_memory_size_for_profile_v2(self._profile),
            strategies.USER_MANAGED: 0,
        }[self._strategy]
        self._gpu.memory.give(self._held[0])
        self._held[0] = 0
        if not self._gpu.memory.take(needed):
            return False
        self._held[0] = needed
        return True

    def _enter(self) -> None:
        """Refuse a second thread between the first call that prepares a run and the run."""
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            self._gpu.misuse(f"a context of {self._engine._name} is used by two threads at once")
        self._thread = thread

    def _change(self, *, settled: bool) -> None:
        self._state += 1
        self._settled = settled

    def _refuse(self, why: str) -> bool:
        self._thread = None
        report(self._engine._logger, f"IExecutionContext: {why}")
        return False

    def _spoil(self, stream_handle: int, why: str) -> bool:
        capture = self._gpu.stream(stream_handle).capture
        assert capture is not None
        capture.invalid = True
        self._gpu.errors[threading.get_ident()] = "cudaErrorStreamCaptureUnsupported"
        return self._refuse(why)


def _run(
    engine: ICudaEngine, shapes: dict[str, Shape], spans: dict[str, Span], what: str, count: Any, context: Any
) -> None:
    """Run a graph on the bytes that are there by now."""
    graph = engine._graph
    engine._queued -= 1
    if context() is None:
        raise MisuseError(f"{what}: its context was gone before it ran")
    for span in spans.values():
        alive(span, what)
    feeds = {
        name: spans[name].read(tensor.dtype, f"{what}: {name}").reshape(shapes[name])
        for name, tensor in graph.inputs.items()
    }
    if (arena := spans.get("")) is not None:
        arena.kinds[:] = NOTHING
    for name, value in graph.run(feeds).items():
        if value.shape != shapes[name]:
            raise MisuseError(f"{what}: {name} has the shape {value.shape}, not {shapes[name]}")
        if name in graph.aliases:
            before = spans[name].data[0].view(value.dtype).reshape(value.shape)
            count(cache_bytes=int((before != value).sum()) * value.dtype.itemsize)
        else:
            count(output_bytes=value.nbytes)
        spans[name].write(value)
        assert (spans[name].kinds == kind_of(value.dtype)).all()
