"""The host as a device: memory of numpy arrays, copies by numpy, and nothing that has to be waited for."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.device import ALIGNMENT, Plane, Shape, Wanted
from mmemb_deploy.errors import BackendError


class HostMemory:
    """Bytes of a numpy array, aligned as device memory is; pages that nobody writes cost nothing."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._bytes = np.zeros(nbytes + ALIGNMENT, np.uint8)
        self.address = self._bytes.ctypes.data + -self._bytes.ctypes.data % ALIGNMENT


class HostDevice:
    """The CPU's own memory as a `device.Device`."""

    def __init__(self) -> None:
        self.lock = RLock()

    def allocate(self, nbytes: int) -> HostMemory:
        """Return memory that is all zeros. Raises BackendError where there is not so much."""
        try:
            return HostMemory(nbytes)
        except MemoryError as error:
            raise BackendError(
                f"the machine has no {nbytes} bytes of memory left: pass shorter inputs or a smaller batch_size"
            ) from error

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy an array to an address."""
        _at(address, array.shape, array.dtype.str)[...] = array

    def download(self, wanted: Sequence[Wanted]) -> list[NDArray[Any]]:
        """Return copies of arrays at addresses."""
        return [_at(each.address, each.shape, np.dtype(each.dtype).str).copy() for each in wanted]

    def copy(self, source: Plane, target: Plane, width: int, height: int) -> None:
        """Copy lines."""
        if height == 1:
            ctypes.memmove(target.address, source.address, width)
        elif width and height:
            _lines(target, width, height)[:] = _lines(source, width, height)

    def record(self, start: Callable[[], None]) -> Callable[[], None]:
        """Return `start`: there is no queue to fill."""
        return start


@lru_cache(maxsize=4096)  # what a step reads and writes lies where it lay, and to describe it takes longer than to copy
def _at(address: int, shape: Shape, dtype: str) -> NDArray[Any]:
    """Return the array at an address; it keeps no memory alive."""
    return np.ndarray(shape, dtype, _memory(address, math.prod(shape) * np.dtype(dtype).itemsize))


def _lines(plane: Plane, width: int, height: int) -> NDArray[np.void]:
    """Return lines as one element each: numpy lets go of the interpreter to copy more than 500, and waits for it after.

    Beside threads that keep it busy, that wait took four times as long as the copy.
    """
    memory = _memory(plane.address, plane.pitch * (height - 1) + width)
    return np.ndarray(height, np.dtype((np.void, width)), memory, 0, plane.pitch)


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * nbytes).from_address(address))
