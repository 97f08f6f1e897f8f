"""What came to the card and left it: how often, how much, how fast.

In: each change of what a model holds on the card. Out: counts for the report, and the sentence for the log.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .settings import GIB


@dataclass
class Tally:
    """Moves in one direction, summed up, and the last of them."""

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0
    last_bytes: int = 0
    last_seconds: float = 0.0

    def add(self, size_bytes: int, seconds: float) -> None:
        self.count += 1
        self.bytes += size_bytes
        self.seconds += seconds
        self.last_bytes, self.last_seconds = size_bytes, seconds

    @property
    def last(self) -> str:
        """The last move as people read it."""
        return f"{self.last_bytes / GIB:.2f} GiB in {self.last_seconds:.3f} s"

    @property
    def last_gib_per_s(self) -> float:
        return self.last_bytes / GIB / max(self.last_seconds, 1e-9)


@dataclass
class Moves:
    """The moves of one model. The first arrival is counted apart: it reads the file and locks pages."""

    first: Tally = field(default_factory=Tally)
    returns: Tally = field(default_factory=Tally)
    departures: Tally = field(default_factory=Tally)

    def note(self, change_bytes: int, seconds: float) -> None:
        """Count a change of what is on the card; none is no move."""
        if change_bytes > 0:
            (self.returns if self.first.count else self.first).add(change_bytes, seconds)
        elif change_bytes < 0:
            self.departures.add(-change_bytes, seconds)
