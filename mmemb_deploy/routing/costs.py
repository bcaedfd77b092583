"""What runs cost here, in seconds, averaged over those that were seen: what a scheduler predicts by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

WEIGHT = 0.1  # of what was seen last
KEPT = 0.99  # of the weight of what was seen before, run by run, where two figures are told apart
EQUAL = 1e-9  # of the square of sizes: where they differ by less, all is said to be fixed
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
        self._seen: dict[int, Mean] = {}

    def add(self, rows: int, seconds: float) -> None:
        """Learn from a run."""
        self._seen.setdefault((rows - 1).bit_length(), Mean()).add(seconds)

    def run(self, rows: int) -> float:
        """Return the seconds of a run."""
        size = (max(rows, 1) - 1).bit_length()
        nearest = min(self._seen, key=lambda seen: abs(seen - size), default=None)
        return 0.0 if nearest is None else self._seen[nearest].value


class Line:
    """Seconds of runs by their size, as least squares see them: `fixed` for any run, and `unit` for each unit of it."""

    def __init__(self) -> None:
        self.fixed = self.unit = 0.0
        self._count = self._size = self._seconds = self._squares = self._products = 0.0

    def add(self, size: float, seconds: float) -> None:
        """Learn from a run."""
        if self._count > 1:
            known = 1.0 if self.unit else max(size * self._count / self._size, 1.0)  # or a run in proportion, at most
            seconds = min(seconds, STALL * known * self.run(size))
        self._count = KEPT * self._count + 1
        self._size = KEPT * self._size + size
        self._seconds = KEPT * self._seconds + seconds
        self._squares = KEPT * self._squares + size * size
        self._products = KEPT * self._products + size * seconds
        spread = self._count * self._squares - self._size**2
        if spread > EQUAL * self._size**2:
            slope = (self._count * self._products - self._size * self._seconds) / spread
            self.unit = min(max(slope, 0.0), self._seconds / self._size)  # neither part takes time back
        self.fixed = (self._seconds - self.unit * self._size) / self._count

    def run(self, size: float) -> float:
        """Return the seconds of a run."""
        return self.fixed + self.unit * size


@dataclass
class Costs:
    """What is known so far."""

    prompts: ByRows = field(default_factory=ByRows)
    steps: ByRows = field(default_factory=ByRows)
    token: Mean = field(default_factory=Mean)  # seconds of a prompt's token, padding included
    tokens: Mean = field(default_factory=Mean)  # of a prompt, padding included
    by_tokens: Line = field(default_factory=Line)  # seconds of prompts that run together, padding included
    by_rows: Line = field(default_factory=Line)  # seconds of steps
    length: Mean = field(default_factory=Mean)  # steps of a rationale, markers included

    def prefilled(self, rows: int, tokens: int, seconds: float) -> None:
        """Learn from prompts of so many tokens together."""
        self.prompts.add(rows, seconds)
        self.token.add(seconds / tokens)
        self.tokens.add(tokens / rows)
        self.by_tokens.add(tokens, seconds)

    def waiting(self, tokens: float) -> float:
        """Return the seconds of prompts of so many tokens that run together; by the mean while all had one size."""
        return self.by_tokens.run(tokens) if self.by_tokens.unit and tokens else self.token.value * tokens

    def stepped(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        self.steps.add(rows, seconds)
        self.by_rows.add(rows, seconds)

    @property
    def padding(self) -> float:
        """Tokens that take as long as another run takes to begin: where there is more padding, two runs are better."""
        return self.by_tokens.fixed / self.by_tokens.unit if self.by_tokens.unit else math.inf

    def prompt(self, rows: int) -> float:
        """Return the seconds that a prompt takes of a device that runs so many at once, seen or not."""
        return self.waiting(self.tokens.value * rows) / rows

    def rationale(self, rows: int) -> float:
        """Return the seconds that a rationale takes of a device that writes so many at once, seen or not."""
        return self.length.value * self.by_rows.run(rows) / rows
