"""Rows to embeddings: batches through the fast path, the router's choice, and the reasoning of the chosen ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from mmemb_deploy.backends.protocol import Cache
from mmemb_deploy.bundle.manifest import BatchLimits
from mmemb_deploy.errors import OptionError
from mmemb_deploy.routing.fast_path import FastPath
from mmemb_deploy.routing.generation import CallersWriter, Generator, OwnWriter
from mmemb_deploy.routing.items import Item, RationaleWriter
from mmemb_deploy.routing.router import Policy, highest

Waiting = list[tuple[Item, Cache]]  # items to reason, each with its cache of one row


class Pipeline:
    """Runs items to their end. No item's result depends on the others, whatever the batches."""

    def __init__(
        self,
        fast_path: FastPath,
        generator: Generator,
        limits: BatchLimits,
        token_bytes: int,
        writer: RationaleWriter | None = None,
    ) -> None:
        """`token_bytes` are those of a token in the KV cache.

        `writer` writes the rationales that no caller gave; None leaves them to the bundle's own generator.
        """
        self.fast_path, self.generator = fast_path, generator
        self._writer = OwnWriter(generator) if writer is None else writer
        self._caller = CallersWriter(generator)
        self._limits, self._token_bytes = limits, token_bytes

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
        together = min(batch_size, self.generator.most_rows)
        keep = policy.reasoning != "never" or any(item.given is not None for item in items)
        for batch in self._batches(items, batch_size, keep=keep):
            waiting += self._embed(batch, policy, keep=keep, held=quota is not None)
            if quota is not None:
                waiting = _best(waiting, quota)
            else:
                while len(waiting) >= together:
                    self._reason(waiting[:together], max_rationale_tokens)
                    waiting = waiting[together:]
            done(len(batch))
        for start in range(0, len(waiting), together):
            self._reason(waiting[start : start + together], max_rationale_tokens)

    def _batches(self, items: Sequence[Item], batch_size: int, *, keep: bool) -> Iterator[list[Item]]:
        """Yield batches of similar length and, among equals, of equal grids; their padded size is within the limit."""
        batch: list[Item] = []
        for item in sorted(items, key=lambda item: (item.row.length, [visual.grid for visual in item.row.visuals])):
            rows, tokens = len(batch) + 1, item.row.length
            within = rows <= batch_size and rows * tokens <= self._limits.tokens
            if batch and not (within and self.fast_path.fits(rows, tokens, after=0 if keep else None)):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _embed(self, batch: list[Item], policy: Policy, *, keep: bool, held: bool) -> Waiting:
        """Run the fast path; return the items that reason, or with `held` all of them, each with its cache."""
        began = time.perf_counter()
        result = self.fast_path.run([item.row for item in batch], keep=keep)
        seconds = time.perf_counter() - began
        for item, embedding_D, score in zip(batch, result.embeddings_BD, result.scores_B, strict=True):
            item.embedding_D, item.score, item.fast_path = embedding_D, float(score), seconds

        def reasons(item: Item) -> bool:
            return item.given is not None or policy.wants(item.score)

        cache = result.cache
        chosen = [index for index, item in enumerate(batch) if held or reasons(item)]
        return [] if cache is None else [(batch[index], cache.take([index])) for index in chosen]

    def _reason(self, waiting: Waiting, max_tokens: int) -> None:
        """Continue from the caches; an item whose writer failed, and may, keeps its direct embedding and why."""
        writers: tuple[tuple[RationaleWriter, bool], ...] = (self._caller, True), (self._writer, False)
        for writer, given in writers:
            group = [pair for pair in waiting if (pair[0].given is not None) is given]
            if not group:
                continue
            began = time.perf_counter()
            written = writer.write([item for item, _ in group], [cache for _, cache in group], max_tokens)
            seconds = time.perf_counter() - began
            for (item, _), one in zip(group, written, strict=True):
                item.generation = seconds
                if isinstance(one, str):
                    item.fallback = one
                else:
                    item.reasoned, item.embedding_D, item.source = one, one.embedding_D, writer.name

    def _check_quota(self, items: Sequence[Item], quota: int) -> None:
        longest = max((item.row.length for item in items), default=0)
        needed = quota * longest * self._token_bytes
        if needed > self._limits.cache_bytes:
            raise OptionError(
                f"reasoning_rate would hold {needed / 2**20:.0f} MiB of KV caches for {quota} inputs, above the "
                f"bundle's {self._limits.cache_bytes / 2**20:.0f} MiB: pass fewer inputs, or a threshold"
            )


def _best(waiting: Waiting, quota: int) -> Waiting:
    """Keep the items with a given rationale, and the `quota` highest scores of the others."""
    kept = set(highest(((item.index, item.score) for item, _ in waiting if item.given is None), quota))
    return [pair for pair in waiting if pair[0].given is not None or pair[0].index in kept]
