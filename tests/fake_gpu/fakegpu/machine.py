"""The fake GPUs: their streams, whose work runs as late as it may, captures, and counters of all that moved.

Work that was put on a stream waits until the host synchronises, which is the latest that CUDA allows and the time at
which every forgotten wait, early free and reused buffer shows. What CUDA itself would refuse is a `CudaError`; what it
would take and then compute nonsense from is a `MisuseError`, which is also kept in `misuses` in case someone
catches it.

Memory, streams, events and engines are of the device that was current in the thread that made them. Work for a device
that is not current is refused, copies too, which CUDA would take: who asks for them forgot to set the device.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from fakegpu.memory import BASE, BYTES, NOTHING, Block, Host, Memory, MisuseError, Span, host_array

Run = Callable[[], None]
OWNED = 44  # bits of the addresses of one device


class CudaError(Exception):
    """What a function of the CUDA runtime returns as its status, by the name of the error."""


@dataclass(frozen=True)
class Work:
    """One thing to do in a stream's order. `start` is called when it is queued, and returns what runs later."""

    what: str
    start: Callable[[], Run]
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Capture:
    """Work that a stream records instead of running it."""

    thread: int
    mode: str
    work: list[Work] = field(default_factory=list)
    invalid: bool = False


@dataclass(eq=False)
class Stream:
    """Work of a device in order: `asked` were queued and `done` have run."""

    device: int = 0
    queue: deque[Run] = field(default_factory=deque)
    asked: int = 0
    done: int = 0
    capture: Capture | None = None

    def run(self, until: int | None = None) -> None:
        """Run what was queued, up to a count."""
        until = self.asked if until is None else until
        while self.done < until:
            self.done += 1
            self.queue.popleft()()


@dataclass(eq=False)
class Event:
    """A mark of a device: the stream that it was recorded in last, and how much must have run there."""

    device: int
    recorded: tuple[Stream, int] | None = None


class Machine:
    """GPUs that are all alike, and the driver's idea of them."""

    _made = 0

    def __init__(
        self, name: str = "NVIDIA Fake H100", target: str = "sm90", total: int = 80 << 30, devices: int = 1
    ) -> None:
        self.name, self.target = name, target
        self.staged = bool(os.environ.get("FAKE_GPU_STAGED"))  # pageable bytes are read when a copy is asked for
        self.first = BASE + Machine._made * (1 << 48)
        Machine._made += 1
        self.memories = [Memory(total, self.first + (device << OWNED)) for device in range(devices)]
        self.lock = threading.RLock()
        self.streams = {-device: Stream(device) for device in range(devices)}  # the default ones; then by handle
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.errors: dict[int, str] = {}  # the last error of a thread, until someone asks for it
        self.misuses: list[str] = []
        self.counts, self.labels = Counter[str](), dict[str, Counter[str]]()
        self.intervals = [Counter[str]()]
        self._thread = threading.local()
        self._failures: dict[str, list[int]] = {}
        self._handle = self.first + (1 << 47)

    def misuse(self, what: str) -> NoReturn:
        """Keep and raise a MisuseError."""
        self.misuses.append(what)
        raise MisuseError(what)

    # what tests ask

    def fail(self, what: str, *, after: int = 0, times: int = 1) -> None:
        """Let something fail: "memory", "deserialize", "context", "capture", "enqueue" or "build"."""
        self._failures[what] = [after, times]

    def fails(self, what: str) -> bool:
        """Whether the next try of something is to fail."""
        left = self._failures.get(what)
        if left is None or left[1] == 0:
            return False
        place = 0 if left[0] else 1
        left[place] -= 1
        return place == 1

    @contextmanager
    def label(self, name: str) -> Generator[Counter[str]]:
        """Count what this thread does meanwhile under a name too; yield those counts."""
        before = getattr(self._thread, "label", None)
        self._thread.label = name
        try:
            yield self.labels.setdefault(name, Counter())
        finally:
            self._thread.label = before

    def tally(self) -> Callable[..., None]:
        """Return what counts for whoever asks now, even later."""
        counters = [self.counts, self.intervals[-1]]
        if (name := getattr(self._thread, "label", None)) is not None:
            counters.append(self.labels[name])

        def count(**counts: int) -> None:
            for counter in counters:
                counter.update(counts)

        return count

    def count(self, **counts: int) -> None:
        """Count something that happens now."""
        self.tally()(**counts)

    # devices

    @property
    def device(self) -> int:
        """The device that is current in this thread."""
        return int(getattr(self._thread, "device", 0))

    @device.setter
    def device(self, device: int) -> None:
        self._thread.device = self.known(device)

    def known(self, device: int) -> int:
        """Return the index of a device that is there. Raises CudaError."""
        if not 0 <= device < len(self.memories):
            raise CudaError("cudaErrorInvalidDevice")
        return device

    @property
    def memory(self) -> Memory:
        """The memory of the device that is current."""
        return self.memories[self.device]

    # streams

    def handle(self) -> int:
        """Return a new handle."""
        self._handle += 16
        return self._handle

    def stream(self, handle: int, *, anywhere: bool = False) -> Stream:
        """Return a stream by its handle; unless `anywhere`, of the device that is current. Raises CudaError."""
        found = self.streams.get(handle or -self.device)
        if found is None or not (anywhere or found.device == self.device):
            raise CudaError("cudaErrorInvalidResourceHandle")
        return found

    def streams_of(self, device: int) -> list[Stream]:
        """Return all streams of a device."""
        return [stream for stream in self.streams.values() if stream.device == device]

    def push(self, stream: Stream, work: Work) -> None:
        """Queue work, or record it where the stream captures."""
        if stream.capture is not None:
            if stream.capture.invalid:
                raise CudaError("cudaErrorStreamCaptureInvalidated")
            stream.capture.work.append(work)
            return
        default = self.streams[-stream.device]
        for other in self.streams_of(stream.device) if stream is default else (default,):
            if other is not stream and other.capture is None:
                other.run()  # the legacy default stream waits for all others, and they for it
        self.count(**work.counts)
        stream.queue.append(work.start())
        stream.asked += 1

    def synchronise(self, *streams: Stream) -> None:
        """Run all that was queued, as a wait of the host does."""
        for stream in streams:
            if stream.capture is not None:
                self.spoil(stream.capture)
            stream.run()
        self.count(synchronisations=1)
        self.intervals.append(Counter())
        for device in {stream.device for stream in streams} or {self.device}:
            self.memories[device].settle()

    def spoil(self, capture: Capture) -> None:
        """End a capture's hopes and refuse the call that did it."""
        capture.invalid = True
        raise CudaError("cudaErrorStreamCaptureUnsupported")

    def unsafe(self) -> None:
        """Refuse a call that does not belong to a stream, such as cudaMalloc, while something is being captured."""
        thread = threading.get_ident()
        for stream in self.streams.values():
            capture = stream.capture
            if capture is not None and (
                capture.mode.endswith("Global") or (capture.thread == thread and not capture.mode.endswith("Relaxed"))
            ):
                self.spoil(capture)

    # memory

    def allocate(self, nbytes: int) -> Block:
        """Return a new block of the device that is current. Raises CudaError where there is no room."""
        block = None if self.fails("memory") else self.memory.allocate(nbytes)
        if block is None:
            raise CudaError("cudaErrorMemoryAllocation")
        self.count(allocations=1, allocated_bytes=nbytes)
        return block

    def free(self, address: int, stream: Stream | None) -> None:
        """Free a block, in the order of a stream."""
        block = self.memories[self._owner(address)].free(address)
        self.count(frees=1)
        if stream is None:
            self.memory.drop(block)
        else:
            self.push(stream, Work("a free", lambda: lambda: self.memory.drop(block)))

    def span(self, device: int, address: int, width: int, what: str, *, height: int = 1, pitch: int = 0) -> Span:
        """Return the bytes at an address that a device is to use; they must be its own."""
        owner = self._owner(address)
        if owner != device and address >= self.first:
            raise MisuseError(f"{what} on device {device} uses memory of device {owner}")
        return self.memories[owner].span(address, width, what, height=height, pitch=pitch)

    def _owner(self, address: int) -> int:
        return min(max(address - self.first, 0) >> OWNED, len(self.memories) - 1)

    def host(self, address: int, nbytes: int) -> Host:
        """Return bytes of the host by their address."""
        if address >= BASE:
            raise CudaError("cudaErrorInvalidValue")
        for begin, array in self.pinned.items():
            if begin <= address < begin + array.nbytes:
                if address + nbytes > begin + array.nbytes:
                    raise MisuseError(f"a copy goes beyond {array.nbytes} page-locked bytes of the host")
                return Host(address, nbytes, pinned=True)
        return host_array(address, nbytes)

    def upload(self, stream: Stream, target: Span, source: Host, kind: int) -> None:
        """Queue a copy from the host, whose bytes must stay as they are until it runs."""
        what = f"a copy of {source.nbytes} bytes to the device"
        if stream.capture is not None and not source.pinned:
            self.spoil(stream.capture)

        def start() -> Run:
            before = source.read(what)
            now = self.staged and not source.pinned

            def run() -> None:
                if not now and not np.array_equal(source.read(what), before):
                    raise MisuseError(f"{what}: the host's bytes were changed before the copy ran")
                alive(target, what)
                target.data[:] = before.reshape(target.data.shape)
                target.kinds[:] = kind

            return run

        self.push(stream, Work(what, start, _copied("h2d", source)))

    def download(self, stream: Stream, target: Host, source: Span) -> None:
        """Queue a copy to the host, whose bytes are nonsense until it runs."""
        what = f"a copy of {target.nbytes} bytes to the host"
        if stream.capture is not None and not target.pinned:
            self.spoil(stream.capture)

        def run() -> None:
            alive(source, what)
            if (source.kinds == NOTHING).any():
                raise MisuseError(f"{what} reads bytes that nobody wrote")
            if target.dtype is not None and source.height == 1:
                source.read(target.dtype, what)
            target.write(source.data, what)

        def start() -> Run:
            target.write(np.full(target.nbytes, 0xFF, np.uint8), what)
            return run

        self.push(stream, Work(what, start, _copied("d2h", target)))

    def move(self, stream: Stream, target: Span, source: Span) -> None:
        """Queue a copy inside the device."""
        what = f"a copy of {source.height} x {source.width} bytes inside the device"
        if source.height == 1 and target.overlaps(source):
            raise MisuseError(f"{what} overlaps itself")

        def run() -> None:
            alive(source, what)
            alive(target, what)
            target.data[:], target.kinds[:] = source.data, source.kinds

        counts = {"d2d_copies": 1, "d2d_bytes": source.width * source.height}
        self.push(stream, Work(what, lambda: run, counts))

    def fill(self, stream: Stream, target: Span, value: int) -> None:
        """Queue a memset."""

        def run() -> None:
            alive(target, "a memset")
            target.data[:], target.kinds[:] = value, BYTES

        self.push(stream, Work("a memset", lambda: run, {"memsets": 1, "memset_bytes": target.width}))


def alive(span: Span, what: str) -> None:
    """Raise MisuseError where memory was let go before work that uses it ran."""
    if span.block.data.size < span.block.nbytes:
        raise MisuseError(f"{what} runs after its memory was freed")


def _copied(direction: str, host: Host) -> dict[str, int]:
    kind = "pinned" if host.pinned else "pageable"
    return {f"{direction}_{kind}_copies": 1, f"{direction}_{kind}_bytes": host.nbytes}
