"""The order in which blocks run: assumed at first, learned from a pass, corrected when it changes.

In: the index of each block as it starts. Out: which blocks come next. A wrong guess costs a stall and is counted; it
never gives a wrong result, because the pipeline fetches whatever a block needs when it starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence


class Walk:
    """Predicts the blocks ahead, across the end of a pass into the next one."""

    def __init__(self, order: Sequence[int]) -> None:
        self.blocks = set(order)
        self._order = list(order)
        self._ahead = deque(order)
        self._trace: list[int] = []
        self._previous: list[int] = []
        self.is_learned = False

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(self._order)

    def begin(self) -> None:
        """Begin a pass, whatever became of the one before."""
        self._ahead = deque(self._order)
        self._trace = []

    def arrive(self, index: int) -> bool:
        """Note that block `index` starts; True if it was not the one predicted."""
        self._trace.append(index)
        distance = self._ahead.index(index) if index in self._ahead else None
        if distance is not None:
            self._ahead.rotate(-1 - distance)
        return self.is_learned and distance != 0

    def ahead(self) -> Iterator[int]:
        """The blocks that run next, soonest first, for one round; a block that runs several times comes as often."""
        return iter(self._ahead)

    def finish(self) -> bool:
        """End a whole pass; True if its order was adopted: at once the first time, later when seen twice in a row.

        A pass that leaves blocks out now and then, as some guidance does, must not throw the order over each time.
        """
        is_new = bool(self._trace) and (not self.is_learned or self._trace == self._previous)
        is_new = is_new and self._trace != self._order
        self.is_learned = self.is_learned or bool(self._trace)
        if is_new:
            self._order = list(self._trace)
        self._previous = self._trace
        self.begin()
        return is_new
