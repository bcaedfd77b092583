"""A decoder whose KV cache stays in device memory, over engines that read and write addresses.

A cache is one block: a plane for the keys and one for the values of every layer, (B, H, R, E) each. Its R slots are
more than its tokens: a step writes into free slots, so that the shapes, the addresses and with them the CUDA graph of
one step serve the next. Slots that are free or padding are masked.

Axes as in `protocol`; R slots of a row, H key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from mmemb_deploy.backends.device import Device, DeviceEngine, Memory, Plane, Workspace, aligned, run_engine
from mmemb_deploy.backends.protocol import Extended, Prefilled, prompt_inputs
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.manifest import ModelFacts
from mmemb_deploy.errors import BackendError
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.rows import Batch

BUCKET = 64  # slots come in multiples of it, so that batches of about one length share their shapes


@dataclass(frozen=True)
class Layout:
    """What the caches of a model have in common: planes, heads, and bytes of one head of one token."""

    planes: int
    heads: int
    head_bytes: int

    def plane_bytes(self, rows: int, slots: int) -> int:
        """Return the bytes from one plane to the next."""
        return aligned(rows * self.heads * slots * self.head_bytes)


@dataclass(frozen=True)
class DeviceCache:
    """Keys and values of some rows. The first `filled` of the R slots may hold tokens; `mask_BR` says which do."""

    device: Device
    layout: Layout
    memory: Memory
    mask_BR: Ints
    filled: int
    next_position_B: Ints  # rotary position of the token that follows each row

    @classmethod
    def empty(cls, device: Device, layout: Layout, slots: int, next_position_B: Ints) -> DeviceCache:
        """Return a cache of free slots."""
        rows = len(next_position_B)
        memory = device.allocate(layout.planes * layout.plane_bytes(rows, slots))
        return cls(device, layout, memory, np.zeros((rows, slots), np.int64), 0, next_position_B)

    def __len__(self) -> int:
        return len(self.mask_BR)

    @property
    def slots(self) -> int:
        """Slots of a row."""
        return int(self.mask_BR.shape[1])

    def address(self, plane: int, row: int = 0) -> int:
        """Return where a row of a plane begins."""
        before = row * self.layout.heads * self.slots * self.layout.head_bytes
        return self.memory.address + plane * self.layout.plane_bytes(len(self), self.slots) + before

    def take(self, rows: Sequence[int]) -> DeviceCache:
        """Return a copy of some rows: with all slots if some are free, else without those that none of them needs."""
        mask_BR = self.mask_BR[rows]
        used = int(np.flatnonzero(mask_BR.any(axis=0))[-1]) + 1
        slots = self.slots if self.filled < self.slots else used
        taken = self.empty(self.device, self.layout, slots, self.next_position_B[rows])
        to_row = 0
        for row, count in _runs(rows):
            taken.copy_rows(to_row, self, row, count)
            to_row += count
        return replace(taken, mask_BR=mask_BR[:, :slots], filled=min(self.filled, slots))

    def split(self) -> list[DeviceCache]:
        """Return a copy of every row."""
        return [self.take([row]) for row in range(len(self))]

    def copy_rows(self, to_row: int, source: DeviceCache, row: int, count: int) -> None:
        """Copy `count` rows of another cache, from `row` on, to the rows from `to_row` on."""
        size = self.layout.head_bytes
        width = min(source.filled, self.slots) * size
        for plane in range(self.layout.planes):
            self.device.copy(
                Plane(source.address(plane, row), source.slots * size),
                Plane(self.address(plane, to_row), self.slots * size),
                width,
                count * self.layout.heads,
            )


class ResidentDecoder:
    """`embedder` and `generator` read and write the tensors of `mmemb_deploy.bundle.abi`.

    `value_bytes` is the size of one number in the cache. Without a generator it only prefills.
    """

    def __init__(
        self,
        device: Device,
        embedder: DeviceEngine,
        generator: DeviceEngine | None,
        model: ModelFacts,
        value_bytes: int,
    ) -> None:
        self._embedder, self._generator = embedder, generator
        self._model = model
        self._layout = Layout(2 * model.layers, model.kv_heads, model.head_dim * value_bytes)
        self._past, self._present = tuple(abi.past_names(model.layers)), tuple(abi.present_names(model.layers))
        self._prefill, self._extend = Workspace(device), Workspace(device)
        self._device = device

    def prefill(self, batch: Batch, visual_tokens_VD: Floats, deepstack_LVD: Floats) -> Prefilled[DeviceCache]:
        """Run prompts."""
        arrays = prompt_inputs(batch, visual_tokens_VD, deepstack_LVD)
        rows, tokens = batch.mask_BT.shape
        cache = DeviceCache.empty(self._device, self._layout, tokens, batch.next_position_B)
        shapes, addresses = self._prefill.upload({name: arrays[name] for name in self._embedder.inputs})
        addresses |= {name: cache.address(plane) for plane, name in enumerate(self._present)}
        hidden = rows, self._model.hidden_size
        outputs = run_engine(
            self._embedder, self._prefill, shapes, addresses, {abi.EMBEDDING: hidden, abi.STATE: hidden}
        )
        cache = replace(cache, mask_BR=batch.mask_BT, filled=tokens)
        return Prefilled(outputs[abi.EMBEDDING], outputs[abi.STATE], cache)

    @contextmanager
    def stack(self, caches: Sequence[DeviceCache], capacity: int) -> Generator[DeviceCache]:
        """Give one cache of all rows with free slots for `capacity` tokens."""
        filled = max(cache.filled for cache in caches)
        slots = -(-(filled + capacity) // BUCKET) * BUCKET
        next_position_B = np.concatenate([cache.next_position_B for cache in caches])
        stacked = DeviceCache.empty(self._device, self._layout, slots, next_position_B)
        mask_BR, row = stacked.mask_BR.copy(), 0
        for cache in caches:
            stacked.copy_rows(row, cache, 0, len(cache))
            mask_BR[row : row + len(cache), : cache.filled] = cache.mask_BR[:, : cache.filled]
            row += len(cache)
        yield replace(stacked, mask_BR=mask_BR, filled=filled)

    def extend(self, cache: DeviceCache, token_ids_BT: Ints, lengths_B: Ints) -> Extended[DeviceCache]:
        """Run new tokens after a cache, and write their keys and values into its free slots."""
        assert self._generator is not None
        (rows, new), slots = token_ids_BT.shape, cache.slots
        if cache.filled + new > slots:
            raise BackendError(
                f"{new} tokens do not fit after {cache.filled} in a cache of {slots}: stack it with more capacity"
            )
        steps_T = np.arange(new)
        new_mask_BT = (steps_T < lengths_B[:, None]).astype(np.int64)
        positions_BT = cache.next_position_B[:, None] + steps_T
        shapes, addresses = self._extend.upload(
            {
                abi.TOKEN_IDS: token_ids_BT,
                abi.POSITION_IDS: np.broadcast_to(positions_BT, (3, *positions_BT.shape)),
                abi.MASK: np.concatenate([cache.mask_BR, new_mask_BT], axis=1),
            }
        )
        layout = self._layout
        shapes |= dict.fromkeys(self._past, (rows, layout.heads, slots, self._model.head_dim))
        addresses |= {name: cache.address(plane) for plane, name in enumerate(self._past)}
        plane_bytes = layout.plane_bytes(rows, slots + new)
        present = self._extend.reserve("present", layout.planes * plane_bytes).address
        addresses |= {name: present + plane * plane_bytes for plane, name in enumerate(self._present)}
        outputs = run_engine(
            self._generator,
            self._extend,
            shapes,
            addresses,
            {abi.EMBEDDING: (rows, self._model.hidden_size), abi.LOGITS: (rows, self._model.vocabulary_size)},
        )
        for plane in range(layout.planes):
            self._device.copy(
                Plane(present + plane * plane_bytes + slots * layout.head_bytes, (slots + new) * layout.head_bytes),
                Plane(cache.address(plane) + cache.filled * layout.head_bytes, slots * layout.head_bytes),
                new * layout.head_bytes,
                rows * layout.heads,
            )
        mask_BR = cache.mask_BR.copy()
        mask_BR[:, cache.filled : cache.filled + new] = new_mask_BT
        grown = replace(
            cache, mask_BR=mask_BR, filled=cache.filled + new, next_position_B=cache.next_position_B + lengths_B
        )
        return Extended(outputs[abi.EMBEDDING], outputs[abi.LOGITS], grown)


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Group rows that follow each other: the first row of each group, and its rows."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and sum(runs[-1]) == row:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((row, 1))
    return runs
