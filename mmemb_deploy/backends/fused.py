"""A decoder over ONNX Runtime's fused graphs: prompts and single tokens run in one graph, over a cache with room.

ONNX Runtime's GroupQueryAttention writes new keys and values into the cache where its input and its output are the same
memory, so that a step costs no copy. Axes as in `session`; H key-value heads, R tokens that a buffer has room for,
E head size, A the three rotary axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy import abi
from mmemb_deploy.backends.session import Extended, Prefilled
from mmemb_deploy.bundle import ModelFacts
from mmemb_deploy.preprocess import Floats, Ints
from mmemb_deploy.rows import Batch

HEADS = 8  # prompts' heads whose caches are remembered


class FusedGraph(Protocol):
    """A session that can also leave outputs where it made them, and write into given memory."""

    def run_in_place(
        self, inputs: dict[str, NDArray[Any]], outputs: Sequence[str], buffers: dict[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """Run once, write the outputs of `buffers` there, and return `outputs`."""
        ...

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once and return all outputs."""
        ...


@dataclass(frozen=True)
class BufferCache:
    """Keys and values of every layer, (B, H, R, E) each, in the order of `abi.past_names`."""

    tensors: tuple[NDArray[Any], ...]
    lengths_B: Ints  # tokens of each row, from the start of its buffer
    next_position_B: Ints  # rotary position of the token that follows each row

    def __len__(self) -> int:
        return len(self.lengths_B)

    def take(self, rows: Sequence[int]) -> BufferCache:
        """Return a copy of some rows with the room they had beyond the longest of all rows."""
        lengths_B = self.lengths_B[rows]
        room = self.tensors[0].shape[2] - int(self.lengths_B.max()) + int(lengths_B.max())
        return BufferCache(
            tuple(tensor[rows, :, :room] for tensor in self.tensors), lengths_B, self.next_position_B[rows]
        )


class FusedDecoder:
    """`embedder` and `generator` are fused graphs; they may be the same. Without a generator it only prefills."""

    def __init__(self, embedder: FusedGraph, generator: FusedGraph | None, model: ModelFacts) -> None:
        self._embedder, self._generator = embedder, generator
        self._model = model
        self._past = tuple(abi.past_names(model.layers))
        self._present = tuple(abi.present_names(model.layers))
        self._heads: dict[bytes, tuple[NDArray[Any], ...]] = {}  # of prompts, by their token ids

    def prefill(self, batch: Batch, visual_tokens_VD: Floats, deepstack_LVD: Floats) -> Prefilled[BufferCache]:
        """Run prompts. Padding follows a row's own tokens, which therefore never see it.

        A prompt that runs alone reuses the cache of its head: the attention continues several tokens in one row only.
        """
        visual = {abi.VISUAL_TOKENS: visual_tokens_VD, abi.DEEPSTACK: deepstack_LVD}
        if len(batch.token_ids_BT) == 1 and batch.head:
            return self._prefill(batch, batch.head, self._head_cache(batch), visual)
        return self._prefill(batch, 0, self._empty(len(batch.token_ids_BT)), visual)

    def _head_cache(self, batch: Batch) -> tuple[NDArray[Any], ...]:
        """Return keys and values of the batch's head, (1, H, head, E) each."""
        key = batch.token_ids_BT[0, : batch.head].tobytes()
        if key not in self._heads:
            if len(self._heads) == HEADS:
                self._heads.pop(next(iter(self._heads)))
            head = Batch(
                token_ids_BT=batch.token_ids_BT[:, : batch.head],
                position_ids_3BT=batch.position_ids_3BT[:, :, : batch.head],
                mask_BT=batch.mask_BT[:, : batch.head],
                visual_index_BT=batch.visual_index_BT[:, : batch.head],
                next_position_B=batch.next_position_B,
                visuals=(),
                head=0,
            )
            self._heads[key] = self._prefill(head, 0, self._empty(1), self._zero_row).cache.tensors
        return self._heads[key]

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

    def stack(self, caches: Sequence[BufferCache], room: int) -> BufferCache:
        """Return one cache of all rows with room for more."""
        lengths_B = np.concatenate([cache.lengths_B for cache in caches])
        shape = len(lengths_B), self._model.kv_heads, int(lengths_B.max()) + room, self._model.head_dim
        buffers = tuple(np.zeros(shape, tensor.dtype) for tensor in caches[0].tensors)
        start = 0
        for cache in caches:
            end, used = start + len(cache), int(cache.lengths_B.max())
            for buffer, tensor in zip(buffers, cache.tensors, strict=True):
                buffer[start:end, :, :used] = tensor[:, :, :used]
            start = end
        return BufferCache(buffers, lengths_B, np.concatenate([cache.next_position_B for cache in caches]))

    def extend(self, cache: BufferCache, token_ids_BT: Ints, lengths_B: Ints) -> Extended[BufferCache]:
        """Run new tokens: single ones of all rows together, several row by row, which is what the attention takes."""
        if token_ids_BT.shape[1] == 1:
            outputs = self._run(cache, slice(None), token_ids_BT)
        else:
            parts = [
                self._run(cache, slice(row, row + 1), token_ids_BT[row : row + 1, :new])
                for row, new in enumerate(lengths_B.tolist())
            ]
            outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        grown = BufferCache(cache.tensors, cache.lengths_B + lengths_B, cache.next_position_B + lengths_B)
        return Extended(outputs[abi.EMBEDDING], outputs[abi.LOGITS], grown)

    def _run(self, cache: BufferCache, rows: slice, token_ids_BT: Ints) -> dict[str, NDArray[Any]]:
        tensors = [tensor[rows] for tensor in cache.tensors]
        new = token_ids_BT.shape[1]
        positions_BT = cache.next_position_B[rows, None] + np.arange(new)
        assert self._generator is not None
        return self._generator.run_in_place(
            {
                abi.TOKEN_IDS: token_ids_BT,
                abi.POSITION_IDS: np.broadcast_to(positions_BT, (3, *positions_BT.shape)),
                abi.LENGTHS: cache.lengths_B[rows] + new,
                abi.LAST: np.full(len(token_ids_BT), new - 1, np.int64),
                **self._no_visuals(token_ids_BT),
                **dict(zip(self._past, tensors, strict=True)),
            },
            (abi.EMBEDDING, abi.LOGITS),
            dict(zip(self._present, tensors, strict=True)),
        )

    def _no_visuals(self, token_ids_BT: Ints) -> dict[str, NDArray[Any]]:
        return {abi.VISUAL_INDEX: np.zeros_like(token_ids_BT), **self._zero_row}

    @cached_property
    def _zero_row(self) -> dict[str, NDArray[Any]]:
        """The visual inputs of tokens that show nothing."""
        row_1D = np.zeros((1, self._model.hidden_size), np.float32)
        return {
            abi.VISUAL_TOKENS: row_1D,
            abi.DEEPSTACK: np.broadcast_to(row_1D, (self._model.deepstack_levels, *row_1D.shape)),
        }
