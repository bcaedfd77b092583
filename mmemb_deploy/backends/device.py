"""What a decoder with its cache in device memory asks of a GPU and of an engine, and memory that both share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmemb_deploy.inputs.preprocess import Floats

ALIGNMENT = 256  # bytes; of an address that TensorRT reads or writes

Shape = tuple[int, ...]


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
class Plane:
    """Where the lines of a copy begin: the first one's address, and the bytes from one to the next."""

    address: int
    pitch: int


class Device(Protocol):
    """A GPU, all of whose work happens in the order in which it was asked for."""

    def allocate(self, nbytes: int) -> Memory:
        """Return memory that is all zeros, aligned to ALIGNMENT."""
        ...

    def upload(self, array: NDArray[Any], memory: Any) -> None:
        """Copy an array to the start of memory."""
        ...

    def download(self, memory: Any, shape: Shape, dtype: DTypeLike) -> NDArray[Any]:
        """Return the start of memory as an array."""
        ...

    def copy(self, source: Plane, target: Plane, width: int, height: int) -> None:
        """Copy `height` lines of `width` bytes inside the device."""
        ...


class DeviceEngine(Protocol):
    """A graph that runs on tensors in device memory."""

    @property
    def inputs(self) -> frozenset[str]:
        """Return the names of its inputs."""
        ...

    def start(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Start a run: shapes of all inputs, addresses of all inputs and outputs. Raises BackendError."""
        ...


class Workspace:
    """Device memory by name that is kept from run to run, and only ever grows; so its addresses mostly stay."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._memory: dict[str, Memory] = {}

    def reserve(self, name: str, nbytes: int) -> Memory:
        """Return at least so many bytes."""
        memory = self._memory.get(name)
        if memory is None or memory.nbytes < nbytes:
            self._memory.pop(name, None)
            memory = self._memory[name] = self.device.allocate(aligned(nbytes))
        return memory

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Shape], dict[str, int]]:
        """Copy arrays to the memory of their names; return their shapes and addresses."""
        addresses = {}
        for name, array in arrays.items():
            memory = self.reserve(name, array.nbytes)
            self.device.upload(array, memory)
            addresses[name] = memory.address
        return {name: array.shape for name, array in arrays.items()}, addresses


def run_engine(
    engine: DeviceEngine,
    workspace: Workspace,
    shapes: Mapping[str, Shape],
    addresses: Mapping[str, int],
    results: Mapping[str, Shape],
) -> dict[str, Floats]:
    """Run an engine whose inputs, and outputs that stay, are in place; return the outputs of `results`, float32."""
    memory = {name: workspace.reserve(name, 4 * int(np.prod(shape))) for name, shape in results.items()}
    engine.start(shapes, {**addresses, **{name: memory[name].address for name in results}})
    return {name: workspace.device.download(memory[name], shape, np.float32) for name, shape in results.items()}


def aligned(nbytes: int) -> int:
    """Round up to where a tensor may begin."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
