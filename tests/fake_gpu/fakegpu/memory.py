"""Memory of a device that is not there: addresses that no host pointer equals, and what every byte of them holds.

Beside every byte lies its kind: nobody wrote it, it was written as plain bytes, or as part of a number of some type. An
access outside of an allocation, one of freed memory, and a read of what nobody wrote or of another type end the test.
"""

from __future__ import annotations

import bisect
import ctypes
import inspect
import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BASE = 0x0D00_0000_0000_0000  # where the device's addresses begin; the host reads none of them and lives
ALIGNMENT = 256
GAP = 1 << 20  # between two allocations, so that no address past one's end is another's
CALLERS = 4  # functions that are looked into for the array behind a host's pointer

NOTHING, BYTES = 0, 1  # kinds of bytes; more are added as types are met
KINDS = ["nothing", "bytes"]

Bytes = NDArray[np.uint8]


class MisuseError(AssertionError):
    """The code under test did what a real device answers with wrong numbers or a crash."""


def kind_of(dtype: np.dtype[Any]) -> int:
    """Return the kind of a type; bytes are a kind of their own, which may be read as any type."""
    if dtype.name == "uint8":
        return BYTES
    if dtype.name not in KINDS:
        KINDS.append(dtype.name)
    return KINDS.index(dtype.name)


@dataclass(eq=False)
class Block:
    """One allocation."""

    address: int
    nbytes: int
    freed: bool = False  # in the order of the host's calls; the bytes go when the stream reaches it
    data: Bytes = field(init=False)
    kinds: Bytes = field(init=False)

    def __post_init__(self) -> None:
        self.data, self.kinds = np.zeros(self.nbytes, np.uint8), np.zeros(self.nbytes, np.uint8)


@dataclass(frozen=True)
class Span:
    """Lines of bytes inside one block: `height` of `width` bytes, `pitch` from one to the next."""

    block: Block
    start: int
    width: int
    height: int = 1
    pitch: int = 0

    @property
    def data(self) -> Bytes:
        """The bytes (height, width), to be read or written."""
        return self._lines(self.block.data)

    @property
    def kinds(self) -> Bytes:
        """Their kinds."""
        return self._lines(self.block.kinds)

    def read(self, dtype: np.dtype[Any], what: str) -> NDArray[Any]:
        """Return a single line as numbers of a type, which must have been written as such."""
        wrong = self.kinds[(self.kinds != BYTES) & (self.kinds != kind_of(dtype))]
        if wrong.size:
            found = " and ".join(KINDS[kind] for kind in np.unique(wrong))
            raise MisuseError(f"{what} reads {dtype.name} where {found} was written")
        values: NDArray[Any] = self.data[0].view(dtype)
        return values

    def write(self, values: NDArray[Any]) -> None:
        """Write numbers over a single line."""
        self.data[0] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.kinds[0] = kind_of(values.dtype)

    def overlaps(self, other: Span) -> bool:
        """Whether the two share a byte, taking lines as if nothing lay between them."""
        ends = [each.start + (each.height - 1) * each.pitch + each.width for each in (self, other)]
        return self.block is other.block and self.start < ends[1] and other.start < ends[0]

    def _lines(self, array: Bytes) -> Bytes:
        shape, strides = (self.height, self.width), (self.pitch, 1)
        return np.lib.stride_tricks.as_strided(array[self.start :], shape, strides)


class Memory:
    """All allocations of a device. `used` counts what engines and contexts take for themselves, too."""

    def __init__(self, total: int, first: int) -> None:
        self.total, self.used, self.reserved, self.threshold = total, 0, 0, 0
        self.taken = 0  # of all that was ever used
        self._next = first
        self._blocks: list[Block] = []

    def take(self, nbytes: int) -> bool:
        """Count so many bytes as used, if they are there."""
        if self.used + nbytes > self.total:
            return False
        self.used += nbytes
        self.taken += nbytes
        self.reserved = max(self.reserved, self.used)
        return True

    def give(self, nbytes: int) -> None:
        """Count so many bytes as free again."""
        self.used -= nbytes

    def settle(self) -> None:
        """Give back to the system what a pool holds above its threshold, as synchronising does."""
        self.reserved = max(self.used, min(self.reserved, self.threshold))

    def allocate(self, nbytes: int) -> Block | None:
        """Return a block whose bytes nobody wrote, or None where the memory is full."""
        if not self.take(nbytes):
            return None
        block = Block(self._next, nbytes)
        self._next += -(-nbytes // ALIGNMENT) * ALIGNMENT + GAP
        self._blocks.append(block)
        return block

    def free(self, address: int) -> Block:
        """Free the block that begins at an address, as seen from the host."""
        block = self.span(address, 0, "freeing").block
        if block.address != address:
            raise MisuseError(f"freeing {address:#x}, which lies inside an allocation of {block.nbytes} bytes")
        block.freed = True
        self.give(block.nbytes)
        return block

    def drop(self, block: Block) -> None:
        """Let a freed block's bytes go."""
        block.data = block.kinds = np.zeros(0, np.uint8)

    def span(self, address: int, width: int, what: str, *, height: int = 1, pitch: int = 0) -> Span:
        """Return the bytes at an address; they must lie in one allocation that is not freed."""
        index = bisect.bisect_right(self._blocks, address, key=lambda block: block.address) - 1
        block = self._blocks[index] if index >= 0 else None
        if block is None or address >= block.address + max(block.nbytes, 1):
            raise MisuseError(f"{what} uses {address:#x}, which is no memory of the device")
        if block.freed:
            raise MisuseError(f"{what} uses memory that was freed")
        start = address - block.address
        beyond = start + (height - 1) * pitch + width - block.nbytes
        if beyond > 0:
            raise MisuseError(f"{what} goes {beyond} bytes beyond an allocation of {block.nbytes}")
        return Span(block, start, width, height, pitch)


@dataclass(frozen=True)
class Host:
    """Bytes of the host: page-locked, or of some array of the caller's, which may go before they are used."""

    address: int
    nbytes: int
    pinned: bool
    dtype: np.dtype[Any] | None = None
    owner: weakref.ref[Any] | None = None

    @property
    def kind(self) -> int:
        """What is written where they are copied to."""
        return BYTES if self.dtype is None else kind_of(self.dtype)

    def read(self, what: str) -> Bytes:
        """Return a copy of the bytes."""
        self._check(what)
        with Path("/proc/self/mem").open("rb", buffering=0) as memory:  # which fails where ctypes would crash
            return np.frombuffer(os.pread(memory.fileno(), self.nbytes, self.address), np.uint8)

    def write(self, values: Bytes, what: str) -> None:
        """Overwrite the bytes."""
        self._check(what)
        ctypes.memmove(self.address, np.ascontiguousarray(values).ctypes.data, self.nbytes)

    def _check(self, what: str) -> None:
        if self.owner is not None and self.owner() is None:
            raise MisuseError(f"{what}: the host's array was freed before the copy ran")


def host_array(address: int, nbytes: int) -> Host:
    """Return pageable bytes at an address, with the array of a caller's that holds them, if one is in sight."""
    frame, looked = inspect.currentframe(), 0
    while frame is not None and looked < CALLERS:
        if "fakegpu" not in frame.f_code.co_filename:
            looked += 1
            for value in list(frame.f_locals.values()):
                if isinstance(value, np.ndarray) and 0 <= address - value.ctypes.data <= value.nbytes - nbytes:
                    return Host(address, nbytes, pinned=False, dtype=value.dtype, owner=_owner(value))
        frame = frame.f_back
    return Host(address, nbytes, pinned=False)


def _owner(array: Any) -> weakref.ref[Any] | None:
    """Return what must live for an array's bytes to stay."""
    while (base := array.obj if isinstance(array, memoryview) else getattr(array, "base", None)) is not None:
        array = base
    try:
        return weakref.ref(array)
    except TypeError:
        return None
