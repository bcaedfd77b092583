"""A decoder over ONNX Runtime's fused graphs: prompts and single tokens run in one graph, over a cache that has room.

ONNX Runtime's GroupQueryAttention writes new keys and values into the cache where its input and its output are the same
memory, so that a step costs no copy. Axes as in `protocol`; H key-value heads, R tokens of capacity in a buffer,
E head size, A the three rotary axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.protocol import Extended, Prefilled
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.manifest import ModelFacts
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.rows import Batch

PREFIXES = 8  # of prompts, whose caches are remembered


class FusedGraph(Protocol):
    """A session that can also be bound to memory that it reads and writes again and again."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once and return all outputs."""
        ...

    def bind(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """Return what runs once over these arrays, as they are then, and leaves all outputs in theirs."""
        ...


@dataclass(frozen=True)
class Step:
    """New tokens of some rows, bound to the buffers of their cache; the next run overwrites the outputs."""

    start: Callable[[], None]
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]

    def run(self, token_ids_BT: Ints, next_position_B: Ints, lengths_B: Ints) -> tuple[Floats, Floats]:
        """Run tokens that follow at `next_position_B`, after which rows have `lengths_B`; return embeddings, logits."""
        self.inputs[abi.TOKEN_IDS][:] = token_ids_BT
        self.inputs[abi.POSITION_IDS][:] = next_position_B[:, None] + np.arange(token_ids_BT.shape[1])
        self.inputs[abi.LENGTHS][:] = lengths_B
        self.start()
        return self.outputs[abi.EMBEDDING].copy(), self.outputs[abi.LOGITS]


@dataclass(frozen=True)
class BufferCache:
    """Keys and values of every layer, (B, H, R, E) each, in the order of `abi.past_names`."""

    tensors: tuple[NDArray[Any], ...]
    lengths_B: Ints  # tokens of each row, from the start of its buffer
    next_position_B: Ints  # rotary position of the token that follows each row
    step: Step | None = None  # what runs one more token of every row, once one has

    def __len__(self) -> int:
        return len(self.lengths_B)

    def take(self, rows: Sequence[int]) -> BufferCache:
        """Return a copy of some rows with the capacity they had beyond the longest of all rows."""
        lengths_B = self.lengths_B[rows]
        capacity = self.tensors[0].shape[2] - int(self.lengths_B.max()) + int(lengths_B.max())
        return BufferCache(
            tuple(tensor[rows, :, :capacity] for tensor in self.tensors), lengths_B, self.next_position_B[rows]
        )

    def split(self) -> list[BufferCache]:
        """Return a view of every row, without capacity beyond it."""
        return [
            BufferCache(
                tuple(tensor[row : row + 1, :, :length] for tensor in self.tensors),
                self.lengths_B[row : row + 1],
                self.next_position_B[row : row + 1],
            )
            for row, length in enumerate(self.lengths_B.tolist())
        ]


class FusedDecoder:
    """`embedder` and `generator` are fused graphs; they may be the same. Without a generator it only prefills."""

    def __init__(self, embedder: FusedGraph, generator: FusedGraph | None, model: ModelFacts) -> None:
        self._embedder, self._generator = embedder, generator
        self._model = model
        self._past = tuple(abi.past_names(model.layers))
        self._present = tuple(abi.present_names(model.layers))
        self._prefixes: dict[bytes, tuple[NDArray[Any], ...]] = {}  # caches of prompts' prefixes, by their token ids
        self._spare: dict[str, NDArray[np.uint8]] = {}  # what the last stack left: new memory is slow to touch

    def prefill(self, batch: Batch, visual_tokens_VD: Floats, deepstack_LVD: Floats) -> Prefilled[BufferCache]:
        """Run prompts. Padding follows a row's own tokens, which therefore never see it.

        A prompt that runs alone reuses the cache of its prefix: the attention continues several tokens in one row only.
        """
        visual = {abi.VISUAL_TOKENS: visual_tokens_VD, abi.DEEPSTACK: deepstack_LVD}
        if len(batch.token_ids_BT) == 1 and batch.prefix:
            return self._prefill(batch, batch.prefix, self._prefix_cache(batch), visual)
        return self._prefill(batch, 0, self._empty(len(batch.token_ids_BT)), visual)

    def _prefix_cache(self, batch: Batch) -> tuple[NDArray[Any], ...]:
        """Return keys and values of the batch's prefix, (1, H, prefix, E) each."""
        key = batch.token_ids_BT[0, : batch.prefix].tobytes()
        if key not in self._prefixes:
            if len(self._prefixes) == PREFIXES:
                self._prefixes.pop(next(iter(self._prefixes)))
            prefix = Batch(
                token_ids_BT=batch.token_ids_BT[:, : batch.prefix],
                position_ids_3BT=batch.position_ids_3BT[:, :, : batch.prefix],
                mask_BT=batch.mask_BT[:, : batch.prefix],
                visual_index_BT=batch.visual_index_BT[:, : batch.prefix],
                next_position_B=batch.next_position_B,
                visuals=(),
                prefix=0,
            )
            self._prefixes[key] = self._prefill(prefix, 0, self._empty(1), self._zero_row).cache.tensors
        return self._prefixes[key]

    def _prefill(
        self, batch: Batch, start: int, past: Sequence[NDArray[Any]], visual: Mapping[str, NDArray[Any]]
    ) -> Prefilled[BufferCache]:
        """Run prompts from `start` on, after the cache of what comes before."""
        rows, tokens = batch.token_ids_BT.shape
        outputs = self._embedder.run(
            {
                abi.TOKEN_IDS: batch.token_ids_BT[:, start:],
                abi.POSITION_IDS: batch.position_ids_3BT[:, :, start:],
                abi.LENGTHS: np.full(rows, tokens, np.int64),
                abi.LAST: batch.last_B - start,
                abi.VISUAL_INDEX: batch.visual_index_BT[:, start:],
                **visual,
                **dict(zip(self._past, past, strict=True)),
            }
        )
        cache = BufferCache(
            tuple(outputs[name] for name in self._present), batch.mask_BT.sum(axis=1), batch.next_position_B
        )
        return Prefilled(outputs[abi.EMBEDDING], outputs[abi.STATE], cache)

    def _empty(self, rows: int) -> list[NDArray[Any]]:
        nothing = np.zeros((rows, self._model.kv_heads, 0, self._model.head_dim), np.float32)
        return [nothing] * len(self._past)

    @contextmanager
    def stack(self, caches: Sequence[BufferCache], capacity: int) -> Generator[BufferCache]:
        """Give one cache of all rows with capacity for more."""
        lengths_B = np.concatenate([cache.lengths_B for cache in caches])
        dtype = caches[0].tensors[0].dtype
        shape = len(lengths_B), self._model.kv_heads, int(lengths_B.max()) + capacity, self._model.head_dim
        size = math.prod(shape) * dtype.itemsize
        memory = self._spare.pop("stack", np.empty(0, np.uint8))  # in one step, lest two threads share it
        if len(memory) < size * len(self._past):
            memory = np.empty(size * len(self._past), np.uint8)
        starts = range(0, size * len(self._past), size)
        buffers = tuple(memory[start : start + size].view(dtype).reshape(shape) for start in starts)
        start = 0
        for cache in caches:
            end, used = start + len(cache), int(cache.lengths_B.max())
            for buffer, tensor in zip(buffers, cache.tensors, strict=True):
                buffer[start:end, :, :used] = tensor[:, :, :used]
                buffer[start:end, :, used:] = 0
            start = end
        yield BufferCache(buffers, lengths_B, np.concatenate([cache.next_position_B for cache in caches]))
        self._spare["stack"] = memory

    def extend(self, cache: BufferCache, token_ids_BT: Ints, lengths_B: Ints) -> Extended[BufferCache]:
        """Run new tokens: single ones of all rows together, several row by row, which is what the attention takes."""
        grown = BufferCache(cache.tensors, cache.lengths_B + lengths_B, cache.next_position_B + lengths_B)
        if token_ids_BT.shape[1] == 1:
            step = cache.step or self._step(cache.tensors, len(cache), 1)
            embeddings_BD, logits_BW = step.run(token_ids_BT, cache.next_position_B, grown.lengths_B)
            return Extended(embeddings_BD, logits_BW, replace(grown, step=step))
        made = []
        for row, new in enumerate(lengths_B.tolist()):
            one = slice(row, row + 1)
            step = self._step(tuple(tensor[one] for tensor in cache.tensors), 1, new)
            made.append(step.run(token_ids_BT[one, :new], cache.next_position_B[one], grown.lengths_B[one]))
        embeddings, logits = zip(*made, strict=True)
        return Extended(np.concatenate(embeddings), np.concatenate(logits), grown)

    def _step(self, tensors: Sequence[NDArray[Any]], rows: int, new: int) -> Step:
        assert self._generator is not None
        inputs: dict[str, NDArray[Any]] = {
            abi.TOKEN_IDS: np.zeros((rows, new), np.int64),
            abi.POSITION_IDS: np.zeros((3, rows, new), np.int64),
            abi.LENGTHS: np.zeros(rows, np.int64),
            abi.LAST: np.full(rows, new - 1, np.int64),
            abi.VISUAL_INDEX: np.zeros((rows, new), np.int64),
            **self._zero_row,
            **dict(zip(self._past, tensors, strict=True)),
        }
        outputs: dict[str, NDArray[Any]] = {
            abi.EMBEDDING: np.empty((rows, self._model.hidden_size), np.float32),
            abi.LOGITS: np.empty((rows, self._model.vocabulary_size), np.float32),
            **dict(zip(self._present, tensors, strict=True)),
        }
        return Step(self._generator.bind(inputs, outputs), inputs, outputs)

    @cached_property
    def _zero_row(self) -> dict[str, NDArray[Any]]:
        """The visual inputs of tokens that show nothing."""
        row_1D = np.zeros((1, self._model.hidden_size), np.float32)
        return {
            abi.VISUAL_TOKENS: row_1D,
            abi.DEEPSTACK: np.zeros((self._model.deepstack_levels, *row_1D.shape), np.float32),
        }
