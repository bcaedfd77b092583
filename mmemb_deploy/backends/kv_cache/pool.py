"""Keys and values of many rows in one block of memory, in which a row stays where it is while others come and go.

The block is a plane of keys and one of values for every layer, (rows, H, R, E) each: R slots for a row, its tokens in
the first of them. Rows are leased, and free again once nothing refers to their lease. Where there is no room, a pool
that grows does so; in another, rows that wait are copied out, to memory of just their size, and back when they go on.

Axes: H key-value heads, E head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmemb_deploy.backends.device import Device, Memory, Plane, aligned
from mmemb_deploy.errors import BackendError

BUCKET = 64  # slots come in multiples of it
FEWEST = 8  # rows of a pool that grows


@dataclass(frozen=True)
class Layout:
    """What the caches of a model have in common: planes, heads, and bytes of one head of one token."""

    planes: int
    heads: int
    head_bytes: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.planes * self.heads * self.head_bytes

    def plane_bytes(self, rows: int, slots: int) -> int:
        """Return the bytes from one plane to the next."""
        return aligned(rows * self.heads * slots * self.head_bytes)


@dataclass(eq=False)
class Row:
    """The lease of a row: where it is, how many tokens it has, and the rotary position of the token that follows."""

    index: int  # -1 while it is copied out
    length: int
    position: int
    parked: tuple[Block, int] | None = None  # and its row there


@dataclass(frozen=True)
class Block:
    """Memory of so many rows of so many slots."""

    layout: Layout
    memory: Memory
    rows: int
    slots: int

    @classmethod
    def of(cls, device: Device, layout: Layout, rows: int, slots: int) -> Block:
        """Allocate one, all zeros: what no token was written to is read too, and hidden only then."""
        return cls(layout, device.allocate(layout.planes * layout.plane_bytes(rows, slots)), rows, slots)

    def addresses(self, row: int) -> Sequence[int]:
        """Return where a row begins in every plane."""
        layout, pitch = self.layout, self.layout.plane_bytes(self.rows, self.slots)
        start = self.memory.address + row * layout.heads * self.slots * layout.head_bytes
        return range(start, start + layout.planes * pitch, pitch)


class Pool:
    """Rows to lease; one that `grows` gets more of them, and more slots, when they are asked for."""

    def __init__(self, device: Device, layout: Layout, rows: int, slots: int, *, grows: bool) -> None:
        self.layout, self.grows = layout, grows
        self._device = device
        self.moves = 0  # how often everything has moved to other addresses
        self._block = Block.of(device, layout, rows, slots)
        self._leases: list[weakref.ref[Row] | None] = [None] * rows
        self._prefixes: list[tuple[bytes, int]] = [(b"", 0)] * rows  # what the first slots of each row hold, and length

    @property
    def rows(self) -> int:
        """Rows that it has."""
        return self._block.rows

    @property
    def slots(self) -> int:
        """Slots of a row."""
        return self._block.slots

    def addresses(self, row: int) -> Sequence[int]:
        """Return where a row begins in every plane."""
        return self._block.addresses(row)

    def holder(self, index: int) -> Row | None:
        """Return the lease of a row, None where it is free."""
        lease = self._leases[index]
        return None if lease is None else lease()

    def written(self, index: int) -> int:
        """Return how many of a row's first slots must not be written: those of its lease, or of a prefix it keeps."""
        row = self.holder(index)
        return self._prefixes[index][1] if row is None else row.length

    def keeps(self, rows: Sequence[Row], prefix: bytes) -> bool:
        """Return whether all rows hold a prefix already, from prompts that were there before."""
        return all(self._prefixes[row.index][0] == prefix for row in rows)

    def keep(self, rows: Sequence[Row], prefix: bytes, length: int) -> None:
        """Note that rows begin with a prefix of so many tokens, which stay when the rows are free."""
        for row in rows:
            self._prefixes[row.index] = prefix, length

    def lease(self, count: int, prefix: bytes = b"") -> list[Row]:
        """Return rows that lie side by side, those that hold a prefix if there are such; others may be copied out.

        Raises BackendError for more rows than there can be.
        """
        if self.grows and (needed := len(self._held(range(self.rows))) + count) > self.rows:
            self._move_to(2 * needed, self.slots)
        if count > self.rows:
            raise self._too_many(count)
        free = [self.holder(index) is None for index in range(self.rows)]
        starts = [start for start in range(self.rows - count + 1) if all(free[start : start + count])]
        kept = (start for start in starts if all(self._prefixes[start + row][0] == prefix for row in range(count)))
        first = next(kept, starts[0] if starts else -1)
        if first < 0:
            first = min(range(self.rows - count + 1), key=lambda start: len(self._held(range(start, start + count))))
            for row in self._held(range(first, first + count)):
                self.part([row])
        rows = [Row(index, 0, 0) for index in range(first, first + count)]
        for row in rows:
            self._leases[row.index] = weakref.ref(row)
        return rows

    def ensure(self, slots: int) -> None:
        """Make sure that every row has so many slots. Raises BackendError where it does not grow."""
        if slots > self.slots:
            if not self.grows:
                raise BackendError(
                    f"{slots} tokens do not fit in the {self.slots} slots of a row: pass a shorter input, or build "
                    "engines for longer ones"
                )
            self._move_to(self.rows, max(2 * self.slots, -(-slots // BUCKET) * BUCKET))

    def bring_in(self, rows: Sequence[Row]) -> None:
        """Copy rows back that were copied out, at once those that lie side by side both there and here."""
        runs: list[tuple[Block, int, list[Row]]] = []  # where the first of them lies
        try:
            for row in rows:
                if row.parked is not None:
                    block, place = row.parked
                    self._put(row, self._free(protected=rows))
                    last, first, run = runs[-1] if runs else (None, 0, [row])
                    if (last, first + len(run), run[-1].index + 1) == (block, place, row.index):
                        run.append(row)
                    else:
                        runs.append((block, place, [row]))
        finally:  # where there is no memory for more rows, those before it are here nevertheless
            for block, first, run in runs:
                self._copy(block, first, self._block, run[0].index, max(row.length for row in run), rows=len(run))

    def part(self, rows: Sequence[Row]) -> None:
        """Copy rows that lie side by side out, all at once, for this pool or another of its layout to bring in."""
        slots = max(1, *(row.length for row in rows))
        outside = Block.of(self._device, self.layout, len(rows), slots)
        self._copy(self._block, rows[0].index, outside, 0, slots, rows=len(rows))
        for place, row in enumerate(rows):
            self._leases[row.index] = None
            row.index, row.parked = -1, (outside, place)

    def gather(self, rows: Sequence[Row]) -> None:
        """Let rows be the first of all: those beyond fill the gaps, and what others hold there moves away."""
        count = len(rows)
        taken = {row.index for row in rows}
        beyond = [row for row in rows if row.index >= count]
        for row, index in zip(beyond, [index for index in range(count) if index not in taken], strict=True):
            if (other := self.holder(index)) is not None:
                self._move(other, self._free(protected=rows, start=count))
            self._move(row, index)

    def _held(self, indices: Collection[int]) -> list[Row]:
        return [row for index in indices if (row := self.holder(index)) is not None]

    def _free(self, protected: Sequence[Row], start: int = 0) -> int:
        """Return a row from `start` on that is free, after copying one out if need be."""
        for index in range(start, self.rows):
            if self.holder(index) is None:
                return index
        if self.grows:
            self._move_to(2 * self.rows, self.slots)
            return self._free(protected, start)
        for row in self._held(range(start, self.rows)):
            if not any(row is one for one in protected):
                index = row.index
                self.part([row])
                return index
        raise self._too_many(len(protected))

    def _too_many(self, rows: int) -> BackendError:
        return BackendError(f"{rows} rows are above the {self.rows} of the KV cache: pass a smaller batch_size")

    def _move(self, row: Row, index: int) -> None:
        """Copy a row to a free one."""
        self._copy(self._block, row.index, self._block, index, row.length)
        self._leases[row.index] = None
        self._put(row, index, self._prefixes[row.index])

    def _put(self, row: Row, index: int, prefix: tuple[bytes, int] = (b"", 0)) -> None:
        """Let a row be a free one, which begins with a prefix."""
        row.index, row.parked = index, None
        self._leases[index] = weakref.ref(row)
        self._prefixes[index] = prefix

    def _move_to(self, rows: int, slots: int) -> None:
        """Move everything to a larger block."""
        block = Block.of(self._device, self.layout, rows, slots)
        for row in self._held(range(self.rows)):
            self._copy(self._block, row.index, block, row.index, row.length)
        self._leases += [None] * (rows - self.rows)
        self._prefixes = [(b"", 0)] * rows
        self._block = block
        self.moves += 1

    def _copy(self, source: Block, row: int, target: Block, to_row: int, tokens: int, *, rows: int = 1) -> None:
        """Copy so many tokens of rows that lie side by side."""
        size, lines = self.layout.head_bytes, rows * self.layout.heads
        for here, there in zip(source.addresses(row), target.addresses(to_row), strict=True):
            self._device.copy(Plane(here, source.slots * size), Plane(there, target.slots * size), tokens * size, lines)
