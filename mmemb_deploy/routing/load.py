"""The gate's threshold under load: reasoning is what gives way when more is asked for than can be done.

The share of inputs that may reason is what a device has left: of its time, beside the prompts that come and the
rationales that must be written (feed-forward, as CascadeServe plans gears), and beside the work that waits, which is to
be gone in a while (feedback, by what queues, as DAGOR does). Costs that are predicted too low make work wait, and so
correct themselves.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mmemb_deploy.bundle.manifest import CurvePoint

UTILISATION = 0.8  # of a device's time, to be planned for
OVERLAP = 2  # seconds of runs in one, where prompts run in a lane too; of runs as slow as they are beside others
DRAIN = 10  # times the patience, in which what waits is to be done beside what comes
WINDOW = 4.0  # seconds over which arrivals are counted,
RECENT = 256  # or the calls, whichever is shorter
JUDGED = 512  # scores that are remembered
ENOUGH = 32  # scores, from which on they tell more than the bundle's curve
NEVER = 2.0  # a threshold above every score


@dataclass(frozen=True)
class Work:
    """Prompts, rationales that must be written whatever the load, and those that may be."""

    prompts: float = 0
    must: float = 0
    may: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.prompts + other.prompts, self.must + other.must, self.may + other.may)


class LoadGate:
    """Raises the threshold for inputs that leave it to the server whether they reason."""

    def __init__(self, curve: Sequence[CurvePoint], *, patience: float, overlaps: bool = False) -> None:
        """`curve` says which share reasons by which threshold until scores do; `patience` is the wait to hold, in s.

        `overlaps` says that prompts run in a lane too.
        """
        self.threshold = 0.0  # the lowest score that may reason
        self.share = 1.0  # of the inputs that it judges
        self._curve = sorted(curve, key=lambda point: point.threshold)
        self._drain = DRAIN * patience
        self._time = UTILISATION * (OVERLAP if overlaps else 1.0)  # of runs, in a second
        self._come = Work()  # since the beginning
        self._calls: deque[tuple[float, Work]] = deque(maxlen=RECENT)  # when, and what had come before
        self._scores: deque[float] = deque(maxlen=JUDGED)
        self._sorted: list[float] = []  # the same

    def arrived(self, now: float, work: Work) -> None:
        """Note a call."""
        self._calls.append((now, self._come))
        self._come += work

    def scored(self, score: float) -> None:
        """Note the score of an input that it judges."""
        if len(self._scores) == JUDGED:
            del self._sorted[bisect_left(self._sorted, self._scores[0])]
        self._scores.append(score)
        insort(self._sorted, score)

    def update(self, now: float, waiting: Work, prompt: float, reasoning: float) -> None:
        """Set the threshold by what waits and what comes, and the seconds of a prompt and of a rationale."""
        if not reasoning:
            return
        while self._calls and self._calls[0][0] < now - WINDOW:
            self._calls.popleft()
        full = len(self._calls) == RECENT
        since, before = self._calls[0] if self._calls else (now, self._come)
        seconds = max(now - since, 1e-9) if full else WINDOW
        prompts, must, may = (
            (getattr(self._come, kind) - getattr(before, kind)) / seconds for kind in ("prompts", "must", "may")
        )
        certain = prompts * prompt + must * reasoning
        certain += (waiting.prompts * prompt + waiting.must * reasoning) / self._drain
        self.share = min(max((self._time - certain) / max(may * reasoning, 1e-9), 0.0), 1.0)
        self.threshold = self._threshold_of(self.share)

    def _threshold_of(self, share: float) -> float:
        if share >= 1:
            return 0.0
        if share <= 0:
            return NEVER
        if len(self._sorted) >= ENOUGH:
            return self._sorted[min(int((1 - share) * len(self._sorted)), len(self._sorted) - 1)]
        return next((point.threshold for point in self._curve if point.reasoning_rate <= share), NEVER)
