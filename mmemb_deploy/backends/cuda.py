"""An NVIDIA GPU: a probe that is safe without a driver, then memory, copies and graphs through NVIDIA's own binding.

Arrays of the host pass through memory that the driver has pinned, so that a copy may go on after the call has returned
whatever becomes of the array.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.device import Plane, RecordError, Wanted
from mmemb_deploy.errors import BackendError, MissingExtraError, OptionError

DRIVER = "libcuda.so.1"
# CUdevice_attribute of the driver's header
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
STAGED = 16 * 2**20  # bytes of pinned memory that uploads take turns in, half by half
KEEP_ALL = 2**64 - 1  # bytes that the driver's pool keeps before it gives freed memory back


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees: its name, its compute capability as "sm90", and its index among them."""

    name: str
    target: str
    index: int = 0


def probe(load: Callable[[str], Any] = ctypes.CDLL, *, device: int = 0) -> Gpu:
    """Ask the driver for the GPU of an index, before any library that takes the process down without one.

    Raises BackendError where there is no driver, or it does not start or shows no GPU, and OptionError where there are
    GPUs, but none of that index.
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
    gpus, handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    ask("cuDeviceGetCount", ctypes.byref(gpus))
    if not 0 <= device < gpus.value:
        raise OptionError(
            f"device is {device}: this process sees {gpus.value} GPU{'' if gpus.value == 1 else 's'}, counted from 0; "
            "CUDA_VISIBLE_DEVICES says which"
        )
    ask("cuDeviceGet", ctypes.byref(handle), device)
    name = ctypes.create_string_buffer(256)
    ask("cuDeviceGetName", name, len(name), handle)
    ask("cuDeviceGetAttribute", ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, handle)
    ask("cuDeviceGetAttribute", ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, handle)
    return Gpu(name.value.decode(), f"sm{major.value}{minor.value}", device)


class Allocation:
    """Bytes on the device, from `address` on; they are given back when nothing refers to them any more."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(cuda.call("cudaMallocAsync", nbytes, cuda.stream))
        finalizer = weakref.finalize(self, cuda.call, "cudaFreeAsync", self.address, cuda.stream)
        finalizer.atexit = False  # the driver may be gone by then, and takes all memory with it


class Pinned:
    """Bytes of the host that the device copies from and to by itself; they are given back as an Allocation is."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.address = int(cuda.call("cudaHostAlloc", nbytes, 0))
        finalizer = weakref.finalize(self, cuda.call, "cudaFreeHost", self.address)
        finalizer.atexit = False
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))


class Cuda:
    """A GPU, by its index, and one stream, on which everything happens in order. Call `probe` first.

    `extra` is what a user is told to install where NVIDIA's binding is missing.
    """

    def __init__(self, index: int = 0, *, extra: str = "tensorrt") -> None:
        try:
            self._runtime: Any = import_module("cuda.bindings.runtime")
        except ModuleNotFoundError as error:
            raise MissingExtraError("cuda.bindings", extra) from error
        self._lock = RLock()
        self.index = index
        self.call("cudaSetDevice", index)
        self.recording = False  # what is started now is recorded, and does not run
        self.stream = int(self.call("cudaStreamCreate"))
        pool = self.call("cudaDeviceGetDefaultMemPool", index)
        threshold = self._runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self.call(
            "cudaMemPoolSetAttribute", pool, threshold, import_module("cuda.bindings.driver").cuuint64_t(KEEP_ALL)
        )
        integrated = self._runtime.cudaDeviceAttr.cudaDevAttrIntegrated
        self._integrated = bool(self.call("cudaDeviceGetAttribute", integrated, index))
        self._uploads = _Uploads(self)
        self._downloads = Pinned(self, 2**16)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; return its value, None where it has none. Raises BackendError."""
        status, *values = getattr(self._runtime, function)(*arguments)
        if int(status) != 0:
            _, text = self._runtime.cudaGetErrorString(status)
            self._runtime.cudaGetLastError()  # or TensorRT would take it for its own
            raise BackendError(f"{function} failed: {text.decode()} (CUDA error {int(status)})")
        return values[0] if values else None

    def free_bytes(self) -> int:
        """Return the device memory that is free; where it is the host's, what the host can free too."""
        if self._integrated:  # cudaMemGetInfo leaves out what is cached
            lines = Path("/proc/meminfo").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
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

    @property
    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold it, again where it is held already, to use the stream, and what is recorded or bound on it."""
        with self._lock:
            self.call("cudaSetDevice", self.index)  # of the calling thread
            yield

    def allocate(self, nbytes: int) -> Allocation:
        """Return memory that is all zeros."""
        memory = Allocation(self, nbytes)
        self.call("cudaMemsetAsync", memory.address, 0, nbytes, self.stream)
        return memory

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy an array to an address; it may be changed at once."""
        self._uploads.send(np.ascontiguousarray(array).reshape(-1).view(np.uint8), address)

    def to_device(self, source: int, address: int, nbytes: int) -> None:
        """Copy pinned bytes to an address."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, source, nbytes, kind, self.stream)

    def download(self, wanted: Sequence[Wanted]) -> list[NDArray[Any]]:
        """Wait, once, for all that was started; return arrays of the host's own."""
        sizes = [np.dtype(each.dtype).itemsize * int(np.prod(each.shape)) for each in wanted]
        if sum(sizes) > len(self._downloads.bytes):
            self._downloads = Pinned(self, 2 * sum(sizes))
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        ends = np.cumsum(sizes).tolist()
        for each, size, end in zip(wanted, sizes, ends, strict=True):
            target = self._downloads.address + end - size
            self.call("cudaMemcpyAsync", target, each.address, size, kind, self.stream)
        self.call("cudaStreamSynchronize", self.stream)
        found = (self._downloads.bytes[end - size : end] for size, end in zip(sizes, ends, strict=True))
        return [part.copy().view(each.dtype).reshape(each.shape) for part, each in zip(found, wanted, strict=True)]

    def copy(self, source: Plane, target: Plane, width: int, height: int) -> None:
        """Copy `height` lines of `width` bytes inside the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        planes = target.address, target.pitch, source.address, source.pitch
        self.call("cudaMemcpy2DAsync", *planes, width, height, kind, self.stream)

    def record(self, start: Callable[[], None]) -> Callable[[], None]:
        """Record what `start` puts on the stream as a CUDA graph, and return what launches it.

        Raises RecordError where that fails; the stream is then as it was.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        failure: BackendError | None = None
        self.recording = True
        try:
            start()
        except BackendError as error:
            failure = error
        finally:
            self.recording = False
        try:
            recorded = self.call("cudaStreamEndCapture", self.stream)
            if failure is None:
                try:
                    return CudaGraph(self, recorded, start).launch
                finally:
                    self.call("cudaGraphDestroy", recorded)
        except BackendError as error:
            failure = failure or error  # what began to fail says more than that the capture could not end
        self._runtime.cudaGetLastError()  # or the next call would report it again
        raise RecordError(str(failure)) from failure


class _Uploads:
    """Pinned memory in two halves: while the copies out of one may still run, the other fills."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._memory = Pinned(cuda, STAGED)
        self._copied = [cuda.call("cudaEventCreate") for _ in range(2)]
        self._at = 0

    def send(self, content: NDArray[np.uint8], address: int) -> None:
        """Copy bytes to an address on the device."""
        half, sent = STAGED // 2, 0
        while sent < len(content):
            room = half - self._at % half
            size = min(room, len(content) - sent)
            self._memory.bytes[self._at : self._at + size] = content[sent : sent + size]
            self._cuda.to_device(self._memory.address + self._at, address + sent, size)
            sent += size
            if size == room:
                self._turn()
            else:
                self._at += size

    def _turn(self) -> None:
        """Go on in the other half, once all that was sent from it has arrived."""
        half = STAGED // 2
        full = self._at // half
        self._cuda.call("cudaEventRecord", self._copied[full], self._cuda.stream)
        self._at = half * (1 - full)
        self._cuda.call("cudaEventSynchronize", self._copied[1 - full])


class CudaGraph:
    """A recorded run that starts with one call."""

    def __init__(self, cuda: Cuda, recorded: Any, start: Callable[[], None]) -> None:
        self._cuda = cuda
        self._recorded = start  # holds what the recording runs in, such as an engine's context
        self._executable = cuda.call("cudaGraphInstantiate", recorded, 0)
        finalizer = weakref.finalize(self, cuda.call, "cudaGraphExecDestroy", self._executable)
        finalizer.atexit = False

    def launch(self) -> None:
        """Start the run on the stream."""
        self._cuda.call("cudaGraphLaunch", self._executable, self._cuda.stream)
