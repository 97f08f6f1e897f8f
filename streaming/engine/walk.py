"""The order in which blocks run: assumed at first, learned from a pass, corrected when it changes.

In: the index of each block as it starts. Out: which blocks come next. A wrong guess costs a stall and is counted; it
never gives a wrong result, because the pipeline fetches whatever a block needs when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence


class Walk:
    """Predicts the blocks ahead, across the end of a pass into the next one."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = list(order)
        self._position = 0
        self._trace: list[int] = []
        self._previous: list[int] = []
        self.is_learned = False

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(self._order)

    def begin(self) -> None:
        self._position = 0
        self._trace = []

    def arrive(self, index: int) -> bool:
        """Note that block `index` starts; True if it was not the one predicted."""
        self._trace.append(index)
        ahead = self._find(index)
        if ahead is not None:
            self._position += ahead + 1
        return self.is_learned and ahead != 0

    def _find(self, index: int) -> int | None:
        """How many places ahead `index` is predicted, within one round."""
        for ahead in range(len(self._order)):
            if self._order[(self._position + ahead) % len(self._order)] == index:
                return ahead
        return None

    def upcoming(self, count: int) -> list[int]:
        """Up to `count` different blocks that run next, soonest first."""
        found: list[int] = []
        for ahead in range(len(self._order)):
            if len(found) == count:
                break
            index = self._order[(self._position + ahead) % len(self._order)]
            if index not in found:
                found.append(index)
        return found

    def finish(self) -> None:
        """End a whole pass. Its order is adopted at once the first time, later when it was seen twice in a row.

        A pass that leaves blocks out now and then, as some guidance does, must not throw the order over each time.
        """
        if self._trace and (not self.is_learned or self._trace == self._previous):
            self._order = list(self._trace)
            self.is_learned = True
        self._previous = self._trace
        self.begin()

    def abandon(self) -> None:
        """End a pass that broke off: nothing is learned from it."""
        self.begin()
