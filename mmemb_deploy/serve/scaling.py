"""How many replicas a fleet needs, by the work that waits and the time that engines run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

QUEUED, BUSY = "queued_seconds", "busy"  # what a replica tells: seconds of work, and a share of the time


class ScaleByWork:
    """Takes as many replicas as finish what is queued in time, and as are busy no more than they should be.

    The second part is needed: under load a replica lets fewer inputs reason, so that its queue stays short while its
    answers get worse. `busy` lies below the share of time that replicas are planned for then
    (`mmemb_deploy/routing/load.py`), so more of them come first.
    """

    def __init__(self, queued_seconds: float = 1.0, busy: float = 0.7) -> None:
        """`queued_seconds` of work may wait at a replica, whose engine runs for a share of `busy` of the time."""
        self._most = {QUEUED: queued_seconds, BUSY: busy}

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Tell Ray, which rounds up and minds its bounds and delays."""
        wanted = self.replicas(context.aggregated_metrics or {})
        return context.target_num_replicas if wanted is None else wanted, {}

    def replicas(self, told: Mapping[str, Mapping[Any, float]]) -> float | None:
        """Return how many there should be by what each tells of QUEUED and BUSY; None where nothing is known."""
        wanted = [sum(told[name].values()) / most for name, most in self._most.items() if told.get(name)]
        return max(wanted, default=None)
