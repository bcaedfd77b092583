"""NVIDIA's TensorRT libraries, loaded, and what running an engine needs that they differ in.

No module but this one, `network`, which builds, and `engine`, which runs, touches a name of theirs, which TensorRT
10.16 and 11 and TensorRT for RTX share. A variable is called after the class of what it holds (`config` is an
IBuilderConfig, `context` an IExecutionContext), so that a test can hold every member against the libraries' own lists;
what TensorRT for RTX alone has is used on variables that begin with `rtx`, what only newer releases have on those that
begin with `newer`. What a library's object refers to is kept beside it: the library does not keep it alive.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.errors import BackendError, MissingExtraError, OptionError, check_known
from mmemb_deploy.files import write_whole

TENSORRT: Final = "tensorrt"
TENSORRT_RTX: Final = "tensorrt-rtx"
LIBRARIES: Final = {TENSORRT: ("tensorrt", "tensorrt"), TENSORRT_RTX: ("tensorrt_rtx", "rtx")}  # module and extra
OLDEST: Final = (10, 16)  # of TensorRT: the first that reads opset 23's Attention, and the last for Jetson
# The first releases whose attention heeds lengths and causality at once; TensorRT for RTX 1.5 and 1.6 build one and the
# same engine of every causal kind where lengths are given. Of TensorRT itself it is not known.
LENGTHS_SINCE: Final = {TENSORRT: (11, 4), TENSORRT_RTX: (1, 7)}
# TensorRT for RTX takes no notice of the first, says that it lacks the next two, and fails at the others without a GPU.
NOT_OF_RTX: Final = ("optimization_level", "hardware", "version_compatible", "refit", "strip")


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
        if name == TENSORRT and self._release < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise BackendError(f"TensorRT {self.version} is too old: pip install 'tensorrt>={oldest}'")
        self.errors: list[str] = []
        self.log = _listener(self.trt, self.errors)

    @property
    def _release(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")[:2]))

    def targets(self) -> list[str]:
        """Return the compute capabilities that TensorRT for RTX builds for, as "sm89"."""
        rtx = self.trt
        return [name.lower() for name in rtx.ComputeCapability.__members__ if name.startswith("SM")]

    def check_options(self, options: BuildOptions) -> None:
        """Raise OptionError for a build option that this library or release lacks."""
        if self.name == TENSORRT_RTX:
            for name in NOT_OF_RTX:
                if (value := getattr(options, name)) != getattr(BuildOptions(), name):
                    raise OptionError(
                        f"{name.replace('_', ' ')} is {value}: TensorRT for RTX does not build so; leave it out"
                    )
        since = LENGTHS_SINCE[self.name]
        if options.attention == "lengths" and self._release < since:
            raise OptionError(
                f"attention is 'lengths': {self.name} {self.version} does not read lengths together with a causal "
                f"mask, as {'.'.join(map(str, since))} does; pass 'mask'"
            )

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


def load_engine(library: Library, name: str, plan: Any, *, host_code: bool = False) -> tuple[Any, Any]:
    """Return an engine in device memory, and the runtime that must live as long. `plan` is any buffer.

    `host_code` is for version-compatible engines, which bring code for the CPU with them. Raises BackendError. Call it
    only where a driver works: the library takes the process down otherwise.
    """
    trt = library.trt
    library.errors.clear()
    runtime = trt.Runtime(library.log)
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise library.failure(f"cannot load the engine {name}")
    return engine, runtime


def refit_engine(library: Library, engine: Any, name: str, model: bytes, graph: Path) -> None:
    """Give a stripped engine its weights, which `model`, the graph that it was built from, names beside `graph`.

    Raises BackendError where some are missing.
    """
    trt = library.trt
    library.errors.clear()
    refitter = trt.Refitter(engine, library.log)
    parser_refitter = trt.OnnxParserRefitter(refitter, library.log)
    if not parser_refitter.refit_from_bytes(model, str(graph)) or not refitter.refit_cuda_engine():
        raise library.failure(f"cannot fill the stripped engine {name} with the weights of {graph}")


def describe_layers(library: Library, engine: Any) -> str:
    """Return what the inspector tells of an engine's layers, in JSON: as much as it was built to tell."""
    trt = library.trt
    inspector = engine.create_engine_inspector()
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def runtime_config(library: Library, engine: Any, kernels: bytes, *, eager: bool, shared: Any = None) -> Any:
    """Return what TensorRT for RTX makes a context from: activations in the caller's memory, and a cache of kernels.

    The cache is that of `shared`, another config, or else made of `kernels`: what `save_runtime_cache` wrote, or
    nothing; where another GPU, driver or release left it, it is not used. With `eager` the kernels of new shapes are
    compiled before they run, as a run that is to be recorded needs; without, a slower kernel serves until they are. One
    config makes all contexts of its kind, and lives as long.
    """
    rtx = library.trt
    rtx_run = engine.create_runtime_config()
    rtx_run.set_execution_context_allocation_strategy(rtx.ExecutionContextAllocationStrategy.USER_MANAGED)
    rtx_run.dynamic_shapes_kernel_specialization_strategy = (
        rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        if eager
        else rtx.DynamicShapesKernelSpecializationStrategy.LAZY
    )
    if shared is None:
        rtx_kernels = rtx_run.create_runtime_cache()
        if kernels:
            rtx_kernels.deserialize(kernels)
    else:
        rtx_shared = shared
        rtx_kernels = rtx_shared.get_runtime_cache()
    if not rtx_run.set_runtime_cache(rtx_kernels):
        raise library.failure("refuses a cache of kernels")
    return rtx_run


def save_runtime_cache(rtx_run: Any, path: Path) -> None:
    """Write the kernels of a `runtime_config` for the next process, where there are new ones.

    Nothing is kept beside engines that lie where this process cannot write.
    """
    rtx_kernels = rtx_run.get_runtime_cache()
    kernels = bytes(rtx_kernels.serialize())
    if os.access(path.parent, os.W_OK) and not (path.is_file() and path.read_bytes() == kernels):
        write_whole(path, kernels)


def can_record(library: Library, context: Any, stream: int) -> bool:
    """Return whether a context's run can be recorded as a CUDA graph now; TensorRT itself cannot be asked."""
    if library.name != TENSORRT_RTX:
        return True
    rtx_context = context
    return bool(rtx_context.is_stream_capturable(stream))
