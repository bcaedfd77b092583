"""The gate's threshold under load: reasoning is what gives way when more is asked for than can be done.

The share of inputs that may reason is set so that the work at hand, and that which is expected, fit into what a device
does in a second (feed-forward, as CascadeServe plans gears); where inputs wait too long all the same, less is expected
of the device (feedback, by the time spent waiting, as DAGOR does). It falls at once and rises slowly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mmemb_deploy.bundle.manifest import CurvePoint

UTILISATION = 0.85  # of a device's time, to be planned for
HORIZON = 1.0  # seconds, in which what waits is to be done
WINDOW = 4.0  # seconds, over which arrivals are counted
RECOVERY = 0.25  # of all inputs more that may reason, after a second
ENOUGH = 32  # scores, from which on they tell more than the bundle's curve
NEVER = 2.0  # a threshold above every score


@dataclass(frozen=True)
class Backlog:
    """What waits: prompts, rows that are to reason or do, and for how long the first of them has waited, in seconds."""

    prompts: int
    reasoning: int
    waited: float


class LoadGate:
    """Raises the threshold for inputs that leave it to the server whether they reason."""

    def __init__(self, curve: Sequence[CurvePoint], *, patience: float) -> None:
        """`curve` says which share reasons by which threshold until scores do; `patience` is the wait to hold, in s."""
        self.threshold = 0.0  # the lowest score that may reason
        self.share = 1.0  # of the inputs that it judges
        self._curve = sorted(curve, key=lambda point: point.threshold)
        self._patience = patience
        self._arrived: deque[tuple[float, int, int]] = deque()  # when, prompts, and those of them that must reason
        self._scores: deque[float] = deque(maxlen=512)
        self._utilisation = UTILISATION
        self._patient_at = self._updated = 0.0

    def arrived(self, now: float, prompts: int, *, must_reason: int) -> None:
        """Note inputs that came."""
        self._arrived.append((now, prompts, must_reason))

    def scored(self, score: float) -> None:
        """Note the score of an input that it judges."""
        self._scores.append(score)

    def update(self, now: float, backlog: Backlog, prompt: float, reasoning: float) -> None:
        """Set the threshold by what is known now: seconds of a prompt and of a rationale, in full batches."""
        elapsed, self._updated = now - self._updated, now
        if not reasoning:
            return
        self._learn(now, elapsed, backlog.waited)
        while self._arrived and self._arrived[0][0] < now - WINDOW:
            self._arrived.popleft()
        prompts, must = (sum(entry[part] for entry in self._arrived) / WINDOW for part in (1, 2))
        certain = (prompts * HORIZON + backlog.prompts) * prompt
        certain += (must * HORIZON + backlog.reasoning) * reasoning
        judged = max(prompts - must, 1 / WINDOW) * HORIZON * reasoning
        room = (self._utilisation * HORIZON - certain) / judged
        self.share = min(max(room, 0.0), self.share + RECOVERY * elapsed, 1.0)
        self.threshold = self._threshold_of(self.share)

    def _learn(self, now: float, elapsed: float, waited: float) -> None:
        """Expect less of the device for every second of too long a wait, and more again while there is none."""
        if waited <= self._patience:
            self._patient_at = now
            self._utilisation = min(UTILISATION, self._utilisation * 1.05 ** min(elapsed, 1.0))
        elif now - self._patient_at > 1:
            self._utilisation *= 0.8 ** min(elapsed, 1.0)

    def _threshold_of(self, share: float) -> float:
        if share >= 1:
            return 0.0
        if share <= 0:
            return NEVER
        if len(self._scores) >= ENOUGH:
            scores = sorted(self._scores)
            return scores[min(int((1 - share) * len(scores)), len(scores) - 1)]
        return next((point.threshold for point in self._curve if point.reasoning_rate <= share), NEVER)
