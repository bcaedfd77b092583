"""What the runtime asks of a backend: a bundle's graphs, loaded, and a KV cache that stays where the backend computes.

Axes: B rows, T new tokens (padded on the right), D hidden size, W words of the vocabulary, V visual tokens of a batch
and a first row of zeros, L DeepStack levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from numpy.typing import NDArray

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.inputs.preprocess import Floats, Ints
from mmemb_deploy.inputs.rows import Batch


class Session(Protocol):
    """One graph: named arrays in host memory in, named arrays out."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once; raises BackendError if the engine fails."""
        ...


class Cache(Protocol):
    """Keys and values of some rows, in the backend's own memory."""

    def __len__(self) -> int:
        """Return the rows."""
        ...

    def take(self, rows: Sequence[int]) -> Self:
        """Return a copy of some rows, without the padding that none of them needs."""
        ...

    def split(self) -> Sequence[Self]:
        """Return every row as a cache of its own; they may share this one's memory."""
        ...


C = TypeVar("C", bound=Cache)


@dataclass(frozen=True)
class Prefilled(Generic[C]):
    """Of every row's last token: the embedding (B, D), L2-normalised, and the state (B, D); and the rows' cache."""

    embeddings_BD: Floats
    states_BD: Floats
    cache: C


@dataclass(frozen=True)
class Extended(Generic[C]):
    """Of every row's last token: the embedding (B, D), L2-normalised, and the logits (B, W); and the longer cache.

    The logits may be overwritten when that cache is extended.
    """

    embeddings_BD: Floats
    logits_BW: Floats
    cache: C


class Decoder(Protocol[C]):
    """The embedder and the generator of a bundle: prompts in, then more tokens after the cache they left."""

    def prefill(self, batch: Batch, visual_tokens_VD: Floats, deepstack_LVD: Floats) -> Prefilled[C]:
        """Run prompts; `batch.visual_index_BT` says which row of `visual_tokens_VD` a token shows."""
        ...

    def stack(self, caches: Sequence[C], capacity: int) -> AbstractContextManager[C]:
        """Give one cache of all rows, to be extended by at most `capacity` tokens; its memory is its own meanwhile."""
        ...

    def extend(self, cache: C, token_ids_BT: Ints, lengths_B: Ints) -> Extended[C]:
        """Run `lengths_B` new tokens of every row, at least one each. `cache` comes from `stack`, and is used up."""
        ...


@dataclass(frozen=True)
class Engine:
    """A bundle's graphs, loaded by one backend; `name` is the engine, its version and its device."""

    name: str
    vision: Session
    decoder: Decoder[Any]
    gate: Session | None  # None in a bundle that does not reason: its decoder only prefills


class Backend(Protocol):
    """Loads bundles for one engine on one device."""

    def load(self, bundle: Bundle) -> Engine:
        """Load every graph; raises BackendError if the engine refuses one."""
        ...


def prompt_inputs(batch: Batch, visual_tokens_VD: Floats, deepstack_LVD: Floats) -> dict[str, NDArray[Any]]:
    """Return what a portable embedder graph reads of a batch of prompts, by the names of the ABI."""
    return {
        abi.TOKEN_IDS: batch.token_ids_BT,
        abi.POSITION_IDS: batch.position_ids_3BT,
        abi.MASK: batch.mask_BT,
        abi.VISUAL_INDEX: batch.visual_index_BT,
        abi.VISUAL_TOKENS: visual_tokens_VD,
        abi.DEEPSTACK: deepstack_LVD,
    }
