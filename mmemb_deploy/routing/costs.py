"""What runs cost here, in seconds, averaged over those that were seen: what a scheduler predicts by."""

from __future__ import annotations

from dataclasses import dataclass, field

WEIGHT = 0.1  # of what was seen last
STALL = 3  # times the mean that a value counts for at most: a machine that pauses for a moment says little of the next


@dataclass
class Mean:
    """A mean that forgets; the first value stands until there are more."""

    value: float = 0.0
    seen: int = 0

    def add(self, value: float) -> None:
        """Take in a value."""
        self.seen += 1
        if self.seen > 1:
            value = min(value, STALL * self.value)
        self.value += max(WEIGHT, 1 / self.seen) * (value - self.value)


class ByRows:
    """Seconds of runs, by how many rows they had: to the next power of two, the nearest that was seen; else 0."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Mean, Mean]] = {}  # of a run, and of one of its rows

    def add(self, rows: int, seconds: float) -> None:
        """Learn from a run."""
        size = (rows - 1).bit_length()
        if size not in self._seen:
            self._seen[size] = Mean(), Mean()
        run, row = self._seen[size]
        run.add(seconds)
        row.add(seconds / rows)

    def run(self, rows: int) -> float:
        """Return the seconds of a run."""
        return self._nearest(rows)[0].value

    def row(self, rows: int) -> float:
        """Return the seconds of one row of a run."""
        return self._nearest(rows)[1].value

    def _nearest(self, rows: int) -> tuple[Mean, Mean]:
        size = (max(rows, 1) - 1).bit_length()
        nearest = min(self._seen, key=lambda seen: abs(seen - size), default=None)
        return (Mean(), Mean()) if nearest is None else self._seen[nearest]


@dataclass
class Costs:
    """What is known so far."""

    prompts: ByRows = field(default_factory=ByRows)
    steps: ByRows = field(default_factory=ByRows)
    token: Mean = field(default_factory=Mean)  # seconds of a prompt's token, padding included
    length: Mean = field(default_factory=Mean)  # steps of a rationale, markers included

    def prefilled(self, rows: int, tokens: int, seconds: float) -> None:
        """Learn from prompts of so many tokens together."""
        self.prompts.add(rows, seconds)
        self.token.add(seconds / tokens)

    def rationale(self, rows: int) -> float:
        """Return the seconds that a rationale takes of a device that writes so many at once."""
        return self.length.value * self.steps.row(rows)
