"""What a scheduler runs: jobs, the calls that they came in, and how many at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from mmemb_deploy.backends.protocol import Cache
from mmemb_deploy.errors import MmembError
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_deploy.routing.generation import Writing
from mmemb_deploy.routing.items import Item
from mmemb_deploy.routing.router import Policy

PATIENCE = 10.0  # seconds after which a row without a deadline is due; and those that a step in priority is worth


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What may wait to be prefilled; a call that exceeds one is refused whole."""

    rows: float = math.inf
    tokens: float = math.inf
    media_bytes: float = math.inf  # of decoded pixels
    seconds: float = math.inf  # that the prompts before a call may take, as runs have cost


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How rows are run together.

    `patient` fills every batch before it decodes, for the most rows a second: nobody waits for a single one. Without
    it, a batch that fails is run again row by row, so that only the row at fault fails.
    """

    prompts: int = 32  # most rows of a prefill
    rationales: int = 32  # most rows that are decoded together
    patient: bool = True
    bounds: Bounds = Bounds()


@dataclass(eq=False)
class Call:
    """What jobs that came together share: a quota, None or how many of them reason, those of the highest scores."""

    quota: int | None = None
    scoring: int = 0  # jobs whose score is to be known first

    def chooses(self, job: Job) -> bool:
        """Return whether a job's score alone does not decide."""
        return self.quota is not None and job.item.given is None


@dataclass(eq=False)
class Job:
    """An item on its way, and what its caller asked for."""

    item: Item
    policy: Policy
    max_tokens: int  # of its rationale
    call: Call
    priority: int = 0  # the lowest first; it ages, so that nobody starves
    deadline: float = math.inf  # by the scheduler's clock
    yields: bool = False  # whether load may take its reasoning away
    exact: bool = False  # whether it would rather fail than do without the reasoning it is due
    ended: Callable[[Job], None] = lambda _: None  # hears once that there is a result, or an error
    scored: Callable[[Job], None] = lambda _: None  # hears that its prompt has run
    wrote: Callable[[Job], None] | None = None  # hears of every token of its rationale
    error: MmembError | None = None
    cancelled: bool = False
    alone: bool = False  # since a batch that it was in has failed
    arrived: float = 0.0
    cache: Cache | None = None
    writing: Writing | None = None
    began: float = 0.0  # to be decoded

    @property
    def keeps(self) -> bool:
        """Whether its cache may be needed."""
        return self.policy.reasoning != "never" or self.item.given is not None

    @property
    def reasons(self) -> bool:
        """Whether it reasons whatever its score is."""
        return self.policy.reasoning == "always" or self.item.given is not None

    @property
    def due(self) -> float:
        """When it should have begun; the scheduler takes the earliest."""
        return min(self.deadline, self.arrived + PATIENCE) + PATIENCE * self.priority

    @cached_property
    def after(self) -> int:
        """Tokens that may follow its prompt."""
        if not self.keeps:
            return 0
        return PATH_MARKERS + max(self.max_tokens, len(self.item.given or ()))

    @cached_property
    def cache_tokens(self) -> int:
        """Tokens for which its cache has room held."""
        return self.item.row.length + self.after if self.keeps else 0

    @property
    def media_bytes(self) -> int:
        """Bytes of its pixels."""
        return sum(visual.pixels_THWC.nbytes for visual in self.item.row.visuals)
