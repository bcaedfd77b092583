"""What the runtime asks of a backend: a bundle's graphs, loaded, and a KV cache that stays where the backend computes.

Axes: B rows, T new tokens (padded on the right), D hidden size, W words of the vocabulary, V visual tokens of a batch
and a first row of zeros, L DeepStack levels, N images of one shape, F frames of an image, P patches, r rows of a patch,
c bytes of such a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from numpy.typing import NDArray

from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.inputs.preprocess import Floats, Ints, Pixels, VisionTables
from mmemb_deploy.inputs.rows import Batch


class Session(Protocol):
    """One graph: named arrays in host memory in, named arrays out."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once; raises BackendError if the engine fails."""
        ...


class Features(Protocol):
    """What the vision graph makes of one image, in memory of its own where the backend computes."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of that memory."""
        ...


F = TypeVar("F", bound=Features)


class Vision(Protocol[F]):
    """A backend's vision graph, and its features."""

    def most_images(self, frames: int, patches: int) -> int:
        """Return how many images of so many frames and patches a run takes, at least 1."""
        ...

    def run(self, pixels_NFPrc: Pixels, tables: VisionTables) -> list[F]:
        """Return the features of each image. Raises BackendError if the engine fails, or takes no such image."""
        ...

    def join(self, features: Sequence[F]) -> Mapping[str, Any]:
        """Return the visual tokens (V, D) and DeepStack levels (L, V, D) of images in order, after a row of zeros.

        They have the names of the ABI, and are what the backend's own decoder takes.
        """
        ...


class Cache(Protocol):
    """Keys and values of some rows, in the backend's own memory."""

    def __len__(self) -> int:
        """Return the rows."""
        ...

    def take(self, rows: Sequence[int]) -> Self:
        """Return some rows."""
        ...

    def split(self) -> Sequence[Self]:
        """Return every row as a cache of its own."""
        ...

    def joined(self, others: Sequence[Self]) -> Self:
        """Return these rows and those of others, in order."""
        ...


C = TypeVar("C", bound=Cache)


@dataclass(frozen=True)
class Prefilled(Generic[C]):
    """Of every row's last token: the embedding (B, D), L2-normalised, and the state (B, D).

    And the rows' cache, None where none was asked for.
    """

    embeddings_BD: Floats
    states_BD: Floats
    cache: C | None


@dataclass(frozen=True)
class Extended(Generic[C]):
    """Of every row's last token: the likeliest to follow, (B,), the embeddings (D,) that were asked for, L2-normalised.

    `logits` fetches those of every row, (B, W), until the cache is extended again. And the longer cache.
    """

    next_token_B: Ints
    embeddings: Sequence[Floats]
    logits: Callable[[], Floats]
    cache: C


class Decoder(Protocol[C]):
    """The decoder of a bundle: prompts in, then more tokens after the cache they left."""

    @property
    def most_rows(self) -> int:
        """Most rows that go on together from their caches."""
        ...

    def fits(self, rows: int, tokens: int, *, after: int | None) -> bool:
        """Return whether prompts of so many rows and tokens, padding included, can run at once.

        And whether `after` more tokens can follow each; None is for those that nothing follows (see `prefill`).
        """
        ...

    def prefill(self, batch: Batch, visual: Any, *, keep: bool = True) -> Prefilled[C]:
        """Run prompts; `batch.visual_index_BT` says which row of `visual` a token shows.

        `visual` is what the backend made of the batch's images. Without `keep` no cache is kept.
        """
        ...

    def stack(self, caches: Sequence[C], capacity: int) -> AbstractContextManager[C]:
        """Give one cache of all rows, to be extended by at most `capacity` tokens; `caches` stay as they are."""
        ...

    def extend(self, cache: C, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]) -> Extended[C]:
        """Run `lengths_B` new tokens of every row, at least one each, and embed some rows.

        `cache` comes from `stack`, or is a part of such a one, and is used up.
        """
        ...


@dataclass(frozen=True)
class PromptGraphs:
    """A second set of what prompts run by, for another thread at the same time.

    The engine's own decoder goes on from the caches that this one leaves.
    """

    vision: Vision[Any]
    decoder: Decoder[Any]


@dataclass(frozen=True)
class Engine:
    """A bundle's graphs, loaded by one backend; `name` is the engine, its version and its device.

    `beside` are for prompts that run while others do, or caches are extended, where that is the sooner way.
    """

    name: str
    vision: Vision[Any]
    decoder: Decoder[Any]
    gate: Session | None  # None in a bundle that does not reason: its decoder only prefills
    notes: tuple[str, ...] = ()  # what is not as it should be, and costs speed alone
    beside: PromptGraphs | None = None


class Backend(Protocol):
    """Loads bundles for one engine on one device."""

    def load(self, bundle: Bundle) -> Engine:
        """Load every graph; raises BackendError if the engine refuses one."""
        ...
