"""NVIDIA's TensorRT libraries, loaded, and a graph parsed and built by them; `engine` runs what was built.

No other module but `engine` touches a name of theirs, which TensorRT 10.16 and 11 and TensorRT for RTX share. A
variable is called after the class of what it holds (`config` is an IBuilderConfig, `context` an IExecutionContext), so
that a test can hold every member against the libraries' own lists. What a library's object refers to is kept beside it:
the library does not keep it alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

from mmemb_deploy.backends.device import Shape
from mmemb_deploy.errors import BackendError, MissingExtraError, check_known

TENSORRT: Final = "tensorrt"
TENSORRT_RTX: Final = "tensorrt-rtx"
LIBRARIES: Final = {TENSORRT: ("tensorrt", "tensorrt"), TENSORRT_RTX: ("tensorrt_rtx", "rtx")}  # module and extra
OLDEST: Final = (10, 16)  # of TensorRT: the first that reads opset 23's Attention, and the last for Jetson

Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input -> min, opt and max shape


class Watcher(Protocol):
    """Hears of a build's phases, which nest."""

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """Hear that a phase of so many steps begins."""
        ...

    def stepped(self, phase: str, step: int) -> None:
        """Hear that a step, counted from 0, is done."""
        ...

    def finished(self, phase: str) -> None:
        """Hear that a phase ends."""
        ...


class Library:
    """One of the two libraries, loaded; `name` is a key of LIBRARIES. Raises MissingExtraError, BackendError."""

    def __init__(self, name: str) -> None:
        check_known("library", name, LIBRARIES)
        module, extra = LIBRARIES[name]
        try:
            self.trt: Any = import_module(module)
        except ModuleNotFoundError as error:
            raise MissingExtraError(module, extra) from error
        except (ImportError, OSError) as error:  # its shared libraries are not the ones it was built for
            raise BackendError(f"the package {module} cannot be loaded: {error}; install it again") from error
        self.name = name
        self.version: str = self.trt.__version__
        if name == TENSORRT and tuple(map(int, self.version.split(".")[:2])) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise BackendError(f"TensorRT {self.version} is too old: pip install 'tensorrt>={oldest}'")
        self.errors: list[str] = []
        self.log = _listener(self.trt, self.errors)

    def targets(self) -> list[str]:
        """Return the compute capabilities that TensorRT for RTX builds for ahead of time, as "sm89"."""
        rtx = self.trt
        return [name.lower() for name in rtx.ComputeCapability.__members__ if name.startswith("SM")]

    def failure(self, what: str) -> BackendError:
        """Return an error that ends in what the library said last."""
        said = "; ".join(self.errors[-2:]) or "the library gave no reason"
        return BackendError(f"{self.name} {self.version} {what}: {said}")


@cache
def load_library(name: str) -> Library:
    """Load a library once: a process has one logger for all of its objects."""
    return Library(name)


def _listener(trt: Any, errors: list[str]) -> Any:
    """Return a logger that keeps errors and drops the rest."""
    kept = trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR

    def log(_: Any, severity: Any, message: str) -> None:
        if severity in kept:
            errors.append(message)

    return type("Listener", (trt.ILogger,), {"log": log})()


class Network:
    """A parsed graph, ready to be built. Raises BackendError, naming the operator, if the parser refuses the graph."""

    def __init__(self, library: Library, graph: Path) -> None:
        trt = library.trt
        self._library, self._graph = library, graph
        library.errors.clear()
        try:
            builder = trt.Builder(library.log)
        except (RuntimeError, TypeError) as error:
            raise library.failure("has no builder here") from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, library.log)
        self._builder, self._network, self._parser = builder, network, parser
        if not parser.parse_from_file(str(graph)):
            found = [parser.get_error(index) for index in range(parser.num_errors)]
            reasons = [f"{problem.node_operator() or 'the graph'}: {problem.desc()}" for problem in found]
            raise BackendError(f"{library.name} {library.version} cannot parse {graph.name}: {'; '.join(reasons)}")
        self._let_attention_decompose()

    def _let_attention_decompose(self) -> None:
        """Attention has kernels of its own in half precision only; in float32 the builder must write it out."""
        trt, network = self._library.trt, self._network
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type != trt.LayerType.ATTENTION_INPUT:
                continue
            tensor = layer.get_input(0)
            if tensor.dtype == trt.DataType.FLOAT:
                layer.__class__ = trt.IAttentionInputLayer
                attention = layer.attention
                attention.decomposable = True

    def build(
        self, profiles: Sequence[Profile], *, target: str | None, timings: bytes, watcher: Watcher
    ) -> tuple[memoryview, bytes]:
        """Build an engine; return it with what was learned about its kernels' speed, to be passed as `timings` again.

        `target` is for TensorRT for RTX alone, one of `Library.targets`; None is the GPU at hand. Raises BackendError.
        """
        library, builder, network = self._library, self._builder, self._network
        trt = library.trt
        library.errors.clear()
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the graph means float32
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, (smallest, usual, largest) in shapes.items():
                profile.set_shape(name, smallest, usual, largest)
            if config.add_optimization_profile(profile) < 0:
                raise library.failure(f"refuses the profile {dict(shapes)} of {self._graph.name}")
        if library.name == TENSORRT_RTX:  # it has no timing cache
            _aim(trt, config, target)
            timing = None
        else:
            timing = self._timing_cache(config, timings)
        monitor, interrupted = _monitor(trt, watcher)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if interrupted:
            raise KeyboardInterrupt
        if plan is None:
            raise library.failure(f"cannot build {self._graph.name}")
        return memoryview(plan), b"" if timing is None else bytes(timing.serialize())

    def _timing_cache(self, config: Any, timings: bytes) -> Any:
        """Attach a timing cache: the given one, or an empty one if it comes from another device or version."""
        for content in (timings, b""):
            timing = config.create_timing_cache(content)
            if timing is not None and config.set_timing_cache(timing, False):
                return timing
        raise self._library.failure("refuses an empty timing cache")


def _aim(rtx: Any, rtx_config: Any, target: str | None) -> None:
    name = "CURRENT" if target is None else target.upper()
    rtx_config.num_compute_capabilities = 1
    rtx_config.set_compute_capability(getattr(rtx.ComputeCapability, name), 0)


def _monitor(trt: Any, watcher: Watcher) -> tuple[Any, list[bool]]:
    """Return a progress monitor, and a list that fills when the user interrupts it: the library must not see that."""
    interrupted: list[bool] = []

    def step_complete(_: Any, phase: str, step: int) -> bool:
        try:
            watcher.stepped(phase, step)
        except KeyboardInterrupt:
            interrupted.append(True)
        return not interrupted

    def phase_start(_: Any, phase: str, parent: str | None, steps: int) -> None:
        watcher.started(phase, parent, steps)

    def phase_finish(_: Any, phase: str) -> None:
        watcher.finished(phase)

    methods = {"phase_start": phase_start, "step_complete": step_complete, "phase_finish": phase_finish}
    return type("Monitor", (trt.IProgressMonitor,), methods)(), interrupted
