"""An NVIDIA GPU: a probe that is safe without a driver, then memory, copies and graphs through NVIDIA's own binding."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmemb_deploy.backends.device import Plane
from mmemb_deploy.errors import BackendError, MissingExtraError

DRIVER = "libcuda.so.1"
# CUdevice_attribute of the driver's header
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process sees: its name, and its compute capability as "sm90"."""

    name: str
    target: str


def probe(load: Callable[[str], Any] = ctypes.CDLL) -> Gpu:
    """Ask the driver for a GPU, before any library that takes the process down without one.

    Raises BackendError where there is no driver, or it does not start or shows no GPU.
    """
    try:
        driver = load(DRIVER)
    except OSError as error:
        raise BackendError(
            f"there is no NVIDIA driver here ({error}): run on a machine with an NVIDIA GPU and its driver, "
            "or use the backend 'onnxruntime'"
        ) from error

    def ask(function: str, *arguments: Any) -> None:
        status = getattr(driver, function)(*arguments)
        if status != 0:
            raise BackendError(
                f"the NVIDIA driver shows no GPU: {function} returned {status}; "
                "see whether nvidia-smi works and CUDA_VISIBLE_DEVICES names a GPU"
            )

    ask("cuInit", 0)
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    ask("cuDeviceGet", ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(256)
    ask("cuDeviceGetName", name, len(name), device)
    ask("cuDeviceGetAttribute", ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
    ask("cuDeviceGetAttribute", ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(), f"sm{major.value}{minor.value}")


class Allocation:
    """Bytes on the device, from `address` on; they are given back when nothing refers to them any more."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(cuda.call("cudaMallocAsync", nbytes, cuda.stream))
        finalizer = weakref.finalize(self, cuda.call, "cudaFreeAsync", self.address, cuda.stream)
        finalizer.atexit = False  # the driver may be gone by then, and takes all memory with it


class Cuda:
    """The first GPU and one stream, on which everything happens in order. Call `probe` first."""

    def __init__(self) -> None:
        try:
            self._runtime: Any = import_module("cuda.bindings.runtime")
        except ModuleNotFoundError as error:
            raise MissingExtraError("cuda.bindings", "tensorrt") from error
        self.call("cudaSetDevice", 0)
        self.stream = int(self.call("cudaStreamCreate"))

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; return its value, None where it has none. Raises BackendError."""
        status, *values = getattr(self._runtime, function)(*arguments)
        if int(status) != 0:
            _, text = self._runtime.cudaGetErrorString(status)
            raise BackendError(f"{function} failed: {text.decode()} (CUDA error {int(status)})")
        return values[0] if values else None

    def free_bytes(self) -> int:
        """Return the device memory that is free."""
        status, free, _ = self._runtime.cudaMemGetInfo()
        if int(status) != 0:
            raise BackendError(f"cudaMemGetInfo failed with CUDA error {int(status)}")
        return int(free)

    def check_memory(self, needed: int, what: str) -> None:
        """Raise BackendError unless so many bytes are free."""
        free = self.free_bytes()
        if needed > free:
            raise BackendError(
                f"{what} needs {needed / 2**20:.0f} MiB of GPU memory, and {free / 2**20:.0f} MiB are free: close what "
                "else uses the GPU, or build engines for less with `mmemb build --batch`"
            )

    def allocate(self, nbytes: int) -> Allocation:
        """Return memory that is all zeros."""
        memory = Allocation(self, nbytes)
        self.call("cudaMemsetAsync", memory.address, 0, nbytes, self.stream)
        return memory

    def upload(self, array: NDArray[Any], memory: Allocation) -> None:
        """Copy an array to the start of memory."""
        contiguous = np.ascontiguousarray(array)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", memory.address, contiguous.ctypes.data, contiguous.nbytes, kind, self.stream)

    def download(self, memory: Allocation, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Wait for all that was started; return the start of memory as an array."""
        array = np.empty(shape, dtype)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, memory.address, array.nbytes, kind, self.stream)
        self.call("cudaStreamSynchronize", self.stream)
        return array

    def copy(self, source: Plane, target: Plane, width: int, height: int) -> None:
        """Copy `height` lines of `width` bytes inside the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        planes = target.address, target.pitch, source.address, source.pitch
        self.call("cudaMemcpy2DAsync", *planes, width, height, kind, self.stream)

    def capture(self, start: Callable[[], None]) -> CudaGraph:
        """Record what `start` puts on the stream, without running it."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        try:
            start()
        finally:
            recorded = self.call("cudaStreamEndCapture", self.stream)
        try:
            return CudaGraph(self, recorded)
        finally:
            self.call("cudaGraphDestroy", recorded)


class CudaGraph:
    """A recorded run that starts with one call."""

    def __init__(self, cuda: Cuda, recorded: Any) -> None:
        self._cuda = cuda
        self._executable = cuda.call("cudaGraphInstantiate", recorded, 0)
        finalizer = weakref.finalize(self, cuda.call, "cudaGraphExecDestroy", self._executable)
        finalizer.atexit = False

    def launch(self) -> None:
        """Start the run on the stream."""
        self._cuda.call("cudaGraphLaunch", self._executable, self._cuda.stream)
