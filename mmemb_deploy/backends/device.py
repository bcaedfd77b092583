"""What a decoder asks of where it computes: memory, copies, and graphs that read and write addresses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmemb_deploy.bundle.manifest import GraphFacts
from mmemb_deploy.errors import BackendError

ALIGNMENT = 256  # bytes; of an address that TensorRT reads or writes

Shape = tuple[int, ...]


class RecordError(BackendError):
    """What was to be recorded was not, and can still run as it is."""


class Memory(Protocol):
    """Bytes on the device."""

    @property
    def address(self) -> int:
        """Return the address of the first byte."""
        ...

    @property
    def nbytes(self) -> int:
        """Return the size."""
        ...


@dataclass(frozen=True)
class Part:
    """Some bytes of other memory."""

    whole: Memory
    offset: int
    nbytes: int

    @property
    def address(self) -> int:
        """Return the address of the first byte."""
        return self.whole.address + self.offset


@dataclass(frozen=True)
class DeviceArray:
    """An array in device memory, float32 unless its reader says otherwise."""

    memory: Memory
    shape: Shape


@dataclass(frozen=True)
class Plane:
    """Where the lines of a copy begin: the first one's address, and the bytes from one to the next."""

    address: int
    pitch: int


@dataclass(frozen=True)
class Wanted:
    """An array to be read from device memory."""

    address: int
    shape: Shape
    dtype: DTypeLike


class Device(Protocol):
    """Where a decoder computes; all of its work happens in the order in which it was asked for."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Return what a thread holds, again where it holds it already, while it works with the device."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Return memory that is all zeros, aligned to ALIGNMENT."""
        ...

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy an array to the device; it may be changed at once."""
        ...

    def download(self, wanted: Sequence[Wanted]) -> list[NDArray[Any]]:
        """Wait, once, for all that was started; return arrays of the host's own."""
        ...

    def copy(self, source: Plane, target: Plane, width: int, height: int) -> None:
        """Copy `height` lines of `width` bytes inside the device."""
        ...

    def record(self, start: Callable[[], None]) -> Callable[[], None]:
        """Return what starts again all that `start`, which has run before, puts on the device.

        Raises RecordError where that cannot be recorded; nothing has run then.
        """
        ...


class DeviceEngine(Protocol):
    """A graph that runs on tensors in device memory."""

    @property
    def facts(self) -> GraphFacts:
        """Return the graph's tensors."""
        ...

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Return whether it can run inputs of these shapes; a name that is missing is not looked at."""
        ...

    def bind(
        self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], *, again: bool = False
    ) -> Callable[[], None]:
        """Return what starts a run over inputs of these shapes, and inputs and outputs at these addresses.

        The next `bind` ends what it returned, unless `again` says that it will be started again and again.
        Raises BackendError, here and when it starts.
        """
        ...


class Workspace:
    """Device memory by name that is kept from run to run, and only ever grows; so its addresses mostly stay."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._memory: dict[str, Memory] = {}

    def place(self, name: str, memory: Memory) -> None:
        """Let a name be this memory, which must be large enough for all that is asked of it."""
        self._memory[name] = memory

    def reserve(self, name: str, nbytes: int) -> Memory:
        """Return at least so many bytes."""
        memory = self._memory.get(name)
        if memory is None or memory.nbytes < nbytes:
            self._memory.pop(name, None)
            memory = self._memory[name] = self.device.allocate(aligned(nbytes))
        return memory

    def upload(self, arrays: Mapping[str, NDArray[Any] | DeviceArray]) -> tuple[dict[str, Shape], dict[str, int]]:
        """Copy arrays to the memory of their names, where they are not on the device; return shapes and addresses."""
        addresses = {}
        for name, array in arrays.items():
            if isinstance(array, DeviceArray):
                addresses[name] = array.memory.address
            else:
                addresses[name] = self.reserve(name, array.nbytes).address
                self.device.upload(array, addresses[name])
        return {name: array.shape for name, array in arrays.items()}, addresses

    def outputs(self, facts: GraphFacts, shapes: Mapping[str, Shape], *, without: frozenset[str]) -> dict[str, Wanted]:
        """Reserve memory for a graph's outputs, but for those of some names, given the shapes of its inputs."""
        sizes = axis_sizes(facts, shapes)
        found = {}
        for tensor in facts.outputs:
            if tensor.name not in without:
                shape = sized(tensor.shape, sizes)
                nbytes = np.dtype(tensor.dtype).itemsize * math.prod(shape)
                found[tensor.name] = Wanted(self.reserve(tensor.name, nbytes).address, shape, tensor.dtype)
        return found


def axis_sizes(facts: GraphFacts, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the sizes of the axes that vary, by name."""
    return {
        axis: size
        for tensor in facts.inputs
        if tensor.name in shapes
        for axis, size in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(axis, str)
    }


def sized(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> Shape:
    """Put sizes in the place of the axes that vary; one may be a part of another, as "(patches//4)"."""
    found = []
    for axis in shape:
        if isinstance(axis, str):
            name, _, parts = axis.strip("()").partition("//")
            found.append(sizes[name] // int(parts or 1))
        else:
            found.append(axis)
    return tuple(found)


def aligned(nbytes: int) -> int:
    """Round up to where a tensor may begin."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
