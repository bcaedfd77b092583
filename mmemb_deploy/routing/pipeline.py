"""Rows to embeddings: batches through the fast path, the router's choice, and the reasoning of the chosen ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mmemb_deploy.backends.protocol import Cache
from mmemb_deploy.bundle.manifest import BatchLimits, ModelFacts
from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.inputs.rows import Row
from mmemb_deploy.routing.fast_path import FastPath
from mmemb_deploy.routing.generation import Generator, Reasoned
from mmemb_deploy.routing.router import Policy, highest

if TYPE_CHECKING:
    from mmemb_deploy.reasoners.chat import Chat
    from mmemb_deploy.reasoners.remote import RemoteGenerator


@dataclass
class Item:
    """An input on its way: its row, then what the fast path found, then what reasoning wrote."""

    index: int  # of the input in the call
    row: Row
    preprocess: float  # seconds, as the other two
    given: list[int] | None = None  # a rationale that the caller wrote, as token ids
    chat: Chat | None = None  # what a reasoner is sent, where there is one
    embedding_D: Floats | None = None
    score: float = 0.0
    reasoned: Reasoned | None = None
    fallback: str | None = None  # why a reasoner wrote nothing, where it may fail
    fast_path: float = 0.0
    generation: float = 0.0


Waiting = list[tuple[Item, Cache]]  # items to reason, each with its cache of one row


class Pipeline:
    """Runs items to their end. No item's result depends on the others, whatever the batches."""

    def __init__(
        self,
        fast_path: FastPath,
        generator: Generator,
        model: ModelFacts,
        limits: BatchLimits,
        remote: RemoteGenerator | None = None,
    ) -> None:
        """`remote` writes the rationales in place of `generator`, which then follows them."""
        self.fast_path, self.generator, self.remote = fast_path, generator, remote
        self._model, self._limits = model, limits

    def run(
        self,
        items: Sequence[Item],
        policy: Policy,
        *,
        batch_size: int,
        max_rationale_tokens: int,
        done: Callable[[int], None],
    ) -> None:
        """Fill in every item; `done` hears how many more have passed the fast path.

        Raises OptionError if the policy's rate would hold more KV caches than the limits allow; BackendError where the
        reasoner fails and must not.
        """
        quota = policy.quota(len(items))
        if quota is not None:
            self._check_quota(items, quota)
        waiting: Waiting = []
        for batch in self._batches(items, batch_size):
            cache = self._embed(batch)
            if quota is not None:
                held = ((item, cache.take([place])) for place, item in enumerate(batch))  # to be let go one by one
                waiting = _best([*waiting, *held], quota)
            else:
                waiting += _chosen(batch, cache, policy)
                while len(waiting) >= batch_size:
                    self._reason(waiting[:batch_size], max_rationale_tokens)
                    waiting = waiting[batch_size:]
            done(len(batch))
        for start in range(0, len(waiting), batch_size):
            self._reason(waiting[start : start + batch_size], max_rationale_tokens)

    def _batches(self, items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
        """Yield batches of similar length and, among equals, of equal grids; their padded size is within the limit."""
        batch: list[Item] = []
        for item in sorted(items, key=lambda item: (item.row.length, [visual.grid for visual in item.row.visuals])):
            full = len(batch) == batch_size or (len(batch) + 1) * item.row.length > self._limits.tokens
            if batch and full:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _embed(self, batch: list[Item]) -> Cache:
        began = time.perf_counter()
        result = self.fast_path.run([item.row for item in batch])
        seconds = time.perf_counter() - began
        for item, embedding_D, score in zip(batch, result.embeddings_BD, result.scores_B, strict=True):
            item.embedding_D, item.score, item.fast_path = embedding_D, float(score), seconds
        return result.cache

    def _reason(self, waiting: Waiting, max_tokens: int) -> None:
        """Continue from the caches: along written rationales in one pass, along the model's own token by token."""
        for follows in (True, False):
            group = [pair for pair in waiting if (pair[0].given is not None) is follows]
            if not group:
                continue
            if not follows and self.remote is not None:
                self._ask(group, self.remote, max_tokens)
                continue
            began = time.perf_counter()
            caches = [cache for _, cache in group]
            if follows:
                results = self.generator.follow(caches, [item.given or [] for item, _ in group])
            else:
                results = self.generator.generate(caches, max_tokens)
            seconds = time.perf_counter() - began
            for (item, _), reasoned in zip(group, results, strict=True):
                item.reasoned, item.embedding_D, item.generation = reasoned, reasoned.embedding_D, seconds

    def _ask(self, group: Waiting, remote: RemoteGenerator, max_tokens: int) -> None:
        """Follow what the reasoner writes; where it may fail and does, the item keeps its direct embedding and why."""
        began = time.perf_counter()
        written = remote.write({item.index: item.chat for item, _ in group if item.chat is not None}, max_tokens)
        for item, _ in group:
            item.fallback = written[item.index].failure
        answered = [(item, cache, written[item.index]) for item, cache in group if item.fallback is None]
        if answered:
            _, caches, rationales = zip(*answered, strict=True)
            results = self.generator.follow(caches, [rationale.token_ids for rationale in rationales])
            for (item, _, rationale), reasoned in zip(answered, results, strict=True):
                item.reasoned = replace(reasoned, truncated=rationale.truncated)
                item.embedding_D = reasoned.embedding_D
        for item, _ in group:
            item.generation = time.perf_counter() - began

    def _check_quota(self, items: Sequence[Item], quota: int) -> None:
        model = self._model
        longest = max((item.row.length for item in items), default=0)
        needed = quota * longest * model.layers * 2 * model.kv_heads * model.head_dim * 4
        if needed > self._limits.cache_bytes:
            raise OptionError(
                f"reasoning_rate would hold {needed / 2**20:.0f} MiB of KV caches for {quota} inputs, above the "
                f"bundle's {self._limits.cache_bytes / 2**20:.0f} MiB: pass fewer inputs, or a threshold"
            )


def _chosen(batch: Sequence[Item], cache: Cache, policy: Policy) -> Waiting:
    """Return the items that reason; where some do not, their caches are not kept."""
    places = [place for place, item in enumerate(batch) if item.given is not None or policy.wants(item.score)]
    if not places:
        return []
    kept = cache if len(places) == len(batch) else cache.take(places)
    return list(zip((batch[place] for place in places), kept.split(), strict=True))


def _best(waiting: Waiting, quota: int) -> Waiting:
    """Keep the items with a given rationale, and the `quota` highest scores of the others."""
    kept = set(highest(((item.index, item.score) for item, _ in waiting if item.given is None), quota))
    return [pair for pair in waiting if pair[0].given is not None or pair[0].index in kept]
