# ruff: noqa: N802, N803 - names are CUDA's
"""The functions of `cuda.bindings.runtime` that the fake GPU has, by their own names and arguments.

Each returns its values without the status. Handles and addresses come as whatever the real binding took.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from fakegpu.machine import Capture, CudaError, Event, Machine, Run, Stream, Work
from fakegpu.memory import BASE, Memory, MisuseError, Span


class Runtime:
    """The CUDA runtime of one machine; `real` is the module whose functions these stand for."""

    def __init__(self, machine: Machine, real: Any) -> None:
        self._gpu, self._real = machine, real

    # devices and errors

    def cudaSetDevice(self, device: int) -> None:
        self._gpu.device = device

    def cudaGetDevice(self) -> int:
        return self._gpu.device

    def cudaGetDeviceCount(self) -> int:
        return len(self._gpu.memories)

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> int:
        self._gpu.known(device)
        if attr.name != "cudaDevAttrIntegrated":
            raise NotImplementedError(f"the fake GPU has no {attr.name}")
        return 0

    def cudaDriverGetVersion(self) -> int:
        return 13000

    def cudaRuntimeGetVersion(self) -> int:
        return 13000

    def cudaMemGetInfo(self) -> tuple[int, int]:
        memory = self._gpu.memory
        return memory.total - memory.reserved, memory.total

    def cudaPeekAtLastError(self) -> None:
        if (error := self._gpu.errors.get(threading.get_ident())) is not None:
            raise CudaError(error)

    def cudaGetLastError(self) -> None:
        if (error := self._gpu.errors.pop(threading.get_ident(), None)) is not None:
            raise CudaError(error)

    # memory

    def cudaMalloc(self, size: int) -> int:
        self._gpu.unsafe()
        return self._gpu.allocate(size).address

    def cudaFree(self, devPtr: Any) -> None:
        self._gpu.unsafe()
        if int(devPtr):
            self._gpu.synchronise(*self._gpu.streams.values())
            self._gpu.free(int(devPtr), None)

    def cudaMallocAsync(self, size: int, hStream: Any) -> int:
        self._outside(hStream)
        return self._gpu.allocate(size).address

    def cudaFreeAsync(self, devPtr: Any, hStream: Any) -> None:
        self._gpu.free(int(devPtr), self._outside(hStream, anywhere=True))

    def cudaHostAlloc(self, size: int, flags: int) -> int:
        del flags
        self._gpu.unsafe()
        array = np.zeros(size, np.uint8)
        self._gpu.pinned[array.ctypes.data] = array
        self._gpu.count(host_allocations=1, host_allocated_bytes=size)
        return array.ctypes.data

    def cudaMallocHost(self, size: int) -> int:
        return self.cudaHostAlloc(size, 0)

    def cudaFreeHost(self, ptr: Any) -> None:
        self._gpu.unsafe()
        self._gpu.synchronise(*self._gpu.streams.values())
        if self._gpu.pinned.pop(int(ptr), None) is None:
            raise CudaError("cudaErrorInvalidValue")

    def cudaDeviceGetDefaultMemPool(self, device: int) -> Any:
        return self._real.cudaMemPool_t(self._gpu.first + self._gpu.known(device))

    def cudaDeviceGetMemPool(self, device: int) -> Any:
        return self.cudaDeviceGetDefaultMemPool(device)

    def cudaMemPoolSetAttribute(self, memPool: Any, attr: Any, value: Any) -> None:
        if attr.name != "cudaMemPoolAttrReleaseThreshold":
            raise NotImplementedError(f"the fake GPU's pool has no {attr.name}")
        self._pool(memPool).threshold = int(value)

    def cudaMemPoolTrimTo(self, memPool: Any, minBytesToKeep: int) -> None:
        memory = self._pool(memPool)
        memory.reserved = max(memory.used, min(memory.reserved, minBytesToKeep))

    # copies

    def cudaMemsetAsync(self, devPtr: Any, value: int, count: int, stream: Any) -> None:
        found = self._stream(stream)
        self._gpu.fill(found, self._gpu.span(found.device, int(devPtr), count, "a memset"), value)

    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: Any, stream: Any) -> None:
        self._copy(self._stream(stream), (int(dst), count), (int(src), count), (count, 1), kind)

    def cudaMemcpy2DAsync(
        self, dst: Any, dpitch: int, src: Any, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> None:
        if width > min(dpitch, spitch):
            raise CudaError("cudaErrorInvalidPitchValue")
        self._copy(self._stream(stream), (int(dst), dpitch), (int(src), spitch), (width, height), kind)

    def cudaMemcpy(self, dst: Any, src: Any, count: int, kind: Any) -> None:
        self._gpu.unsafe()
        self._copy(self._gpu.stream(0), (int(dst), count), (int(src), count), (count, 1), kind)
        self._gpu.synchronise(self._gpu.stream(0))

    def _copy(
        self, stream: Stream, target: tuple[int, int], source: tuple[int, int], size: tuple[int, int], kind: Any
    ) -> None:
        """Queue a copy between two places, each an address and a pitch, of a width and height."""
        gpu, (width, height) = self._gpu, size
        on_device = tuple("H" if address < BASE else "D" for address, _ in (source, target))
        wanted = {
            "cudaMemcpyHostToDevice": ("H", "D"),
            "cudaMemcpyDeviceToHost": ("D", "H"),
            "cudaMemcpyDeviceToDevice": ("D", "D"),
            "cudaMemcpyDefault": on_device,
        }.get(kind.name)
        if wanted != on_device or wanted == ("H", "H"):
            raise CudaError("cudaErrorInvalidValue")
        if not width * height:
            return
        if height > 1 and "H" in on_device:
            raise NotImplementedError("the fake GPU copies planes inside the device alone")
        if wanted == ("H", "D"):
            host = gpu.host(source[0], width)
            gpu.upload(stream, self._span(stream, target, size), host, host.kind)
        elif wanted == ("D", "H"):
            gpu.download(stream, gpu.host(target[0], width), self._span(stream, source, size))
        else:
            gpu.move(stream, self._span(stream, target, size), self._span(stream, source, size))

    def _span(self, stream: Stream, place: tuple[int, int], size: tuple[int, int]) -> Span:
        (address, pitch), (width, height) = place, size
        return self._gpu.span(stream.device, address, width, "a copy", height=height, pitch=pitch)

    def _pool(self, pool: Any) -> Memory:
        return self._gpu.memories[int(pool) - self._gpu.first]

    # streams and events

    def cudaStreamCreate(self) -> Any:
        return self.cudaStreamCreateWithFlags(0)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        del flags
        handle = self._gpu.handle()
        self._gpu.streams[handle] = Stream(self._gpu.device)
        return self._real.cudaStream_t(handle)

    def cudaStreamDestroy(self, stream: Any) -> None:
        if int(stream) >= self._gpu.first:
            self._gpu.stream(int(stream), anywhere=True).run()
            del self._gpu.streams[int(stream)]

    def cudaStreamSynchronize(self, stream: Any) -> None:
        self._gpu.synchronise(self._gpu.stream(int(stream), anywhere=True))

    def cudaDeviceSynchronize(self) -> None:
        self._gpu.synchronise(*self._gpu.streams_of(self._gpu.device))

    def cudaStreamQuery(self, stream: Any) -> None:
        self._poll(self._outside(stream, anywhere=True), None)

    def cudaEventCreate(self) -> Any:
        return self.cudaEventCreateWithFlags(0)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        del flags
        handle = self._gpu.handle()
        self._gpu.events[handle] = Event(self._gpu.device)
        return self._real.cudaEvent_t(handle)

    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        found, mark = self._stream(stream), self._event(event)
        if mark.device != found.device:
            raise CudaError("cudaErrorInvalidResourceHandle")

        def start() -> Run:
            mark.recorded = found, found.asked + 1
            return lambda: None

        self._gpu.push(found, Work("an event", start))

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        del flags

        def start() -> Run:
            recorded = self._event(event).recorded
            return lambda: None if recorded is None else recorded[0].run(recorded[1])

        self._gpu.push(self._stream(stream), Work("a wait for an event", start))

    def cudaEventSynchronize(self, event: Any) -> None:
        recorded = self._event(event).recorded
        if recorded is not None:
            recorded[0].run(recorded[1])
        self._gpu.synchronise()

    def cudaEventQuery(self, event: Any) -> None:
        if (recorded := self._event(event).recorded) is not None:
            self._poll(*recorded)

    def cudaEventDestroy(self, event: Any) -> None:
        self._gpu.events.pop(int(event), None)

    def _poll(self, stream: Stream, until: int | None) -> None:
        """Say that work is not done, and do a little of it, so that who asks again and again comes to an end."""
        if stream.done < (stream.asked if until is None else until):
            stream.run(stream.done + 1)
            raise CudaError("cudaErrorNotReady")

    # capture

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        found = self._outside(stream)
        if found is self._gpu.stream(0):
            raise CudaError("cudaErrorStreamCaptureUnsupported")
        found.capture = Capture(threading.get_ident(), mode.name)
        self._gpu.count(captures=1)

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        found = self._stream(stream)
        capture = found.capture
        if capture is None:
            raise CudaError("cudaErrorIllegalState")
        if capture.thread != threading.get_ident() and not capture.mode.endswith("Relaxed"):
            capture.invalid = True
            raise CudaError("cudaErrorStreamCaptureWrongThread")
        found.capture = None
        if capture.invalid:
            raise CudaError("cudaErrorStreamCaptureInvalidated")
        handle = self._gpu.handle()
        self._gpu.graphs[handle] = capture.work
        return self._real.cudaGraph_t(handle)

    def cudaStreamIsCapturing(self, stream: Any) -> Any:
        capture, status = self._stream(stream).capture, self._real.cudaStreamCaptureStatus
        if capture is None:
            return status.cudaStreamCaptureStatusNone
        if capture.invalid:
            return status.cudaStreamCaptureStatusInvalidated
        return status.cudaStreamCaptureStatusActive

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        del flags
        handle = self._gpu.handle()
        self._gpu.graphs[handle] = self._graph(graph)
        self._gpu.count(instantiations=1)
        return self._real.cudaGraphExec_t(handle)

    def cudaGraphUpload(self, graphExec: Any, stream: Any) -> None:
        self._graph(graphExec)
        self._stream(stream)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:
        found = self._stream(stream)
        for work in self._graph(graphExec):
            self._gpu.push(found, work)
        self._gpu.count(launches=1)

    def cudaGraphDestroy(self, graph: Any) -> None:
        self._gpu.graphs.pop(int(graph), None)

    def cudaGraphExecDestroy(self, graphExec: Any) -> None:
        self._gpu.graphs.pop(int(graphExec), None)

    def _graph(self, graph: Any) -> list[Work]:
        if int(graph) not in self._gpu.graphs:
            raise MisuseError("a graph is used after it was destroyed")
        return self._gpu.graphs[int(graph)]

    def _event(self, event: Any) -> Event:
        if int(event) not in self._gpu.events:
            raise CudaError("cudaErrorInvalidResourceHandle")
        return self._gpu.events[int(event)]

    def _stream(self, stream: Any) -> Stream:
        return self._gpu.stream(int(stream))

    def _outside(self, stream: Any, *, anywhere: bool = False) -> Stream:
        """Return a stream that must not be capturing."""
        found = self._gpu.stream(int(stream), anywhere=anywhere)
        if found.capture is not None:
            self._gpu.spoil(found.capture)
        return found


class Driver:
    """What ctypes gets in the place of libcuda.so.1."""

    def __init__(self, machine: Machine) -> None:
        self._gpu = machine

    def cuInit(self, flags: int) -> int:
        return int(flags)

    def cuDriverGetVersion(self, version: Any) -> int:
        return _write(version, 13000)

    def cuDeviceGetCount(self, count: Any) -> int:
        return _write(count, len(self._gpu.memories))

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        there = 0 <= ordinal < len(self._gpu.memories)
        return _write(device, ordinal) if there else 101  # CUDA_ERROR_INVALID_DEVICE

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        del device
        name.value = self._gpu.name.encode()[: length - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        del device
        digits = self._gpu.target.removeprefix("sm")
        known = {75: int(digits[:-1]), 76: int(digits[-1])}  # major and minor of the compute capability
        return _write(value, known[attribute]) if attribute in known else 1

    def cuDeviceTotalMem_v2(self, nbytes: Any, device: Any) -> int:
        del device
        ctypes.cast(nbytes, ctypes.POINTER(ctypes.c_size_t))[0] = self._gpu.memory.total
        return 0


def _write(target: Any, value: int) -> int:
    ctypes.cast(target, ctypes.POINTER(ctypes.c_int))[0] = value
    return 0
