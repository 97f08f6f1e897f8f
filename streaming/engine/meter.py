"""Counters and timings of a stream of passes.

In: what the pipeline does, as it does it. Out: readings. Times come from the events that order the work anyway; they
are read when the same block is fetched again and its events are long past, so that measuring never waits for anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .device import Device, Event

SMOOTHING = 0.5  # weight of the newest time against the running one


class Visit:
    """The events of one block's stay on the device, from the start of its copy to the end of its compute.

    Its slot is `free` when it is done, or, packed, as soon as it is restored elsewhere.
    """

    __slots__ = ("asked", "done", "fetching", "free", "ready", "restored", "running", "was_used")

    def __init__(self, device: Device) -> None:
        self.fetching: Event = device.event()
        self.ready: Event = device.event()
        self.asked: Event = device.event()
        self.running: Event = device.event()
        self.restored: Event = device.event()
        self.free: Event = device.event()
        self.done: Event = device.event()
        self.was_used = False


@dataclass
class BlockTimes:
    """Running times of one block in milliseconds; None until measured."""

    copy_ms: float | None = None
    wait_ms: float | None = None
    restore_ms: float | None = None
    compute_ms: float | None = None
    visits: int = 0

    def add(self, visit: Visit) -> None:
        """Take the times of a visit whose events are all reached.

        The first visit is left out: it holds what happens once only, such as compiling a kernel.
        """
        self.visits += 1
        if self.visits == 1:
            return
        self.copy_ms = _smooth(self.copy_ms, visit.fetching.elapsed_time(visit.ready))
        self.wait_ms = _smooth(self.wait_ms, visit.asked.elapsed_time(visit.running))
        self.restore_ms = _smooth(self.restore_ms, visit.running.elapsed_time(visit.restored))
        self.compute_ms = _smooth(self.compute_ms, visit.restored.elapsed_time(visit.done))

    @property
    def is_measured(self) -> bool:
        return self.compute_ms is not None


def _smooth(running: float | None, newest: float) -> float:
    return newest if running is None else running + SMOOTHING * (newest - running)


@dataclass
class PassCounts:
    """What happened in one pass, or in all of them."""

    moved_bytes: int = 0
    hits: int = 0
    misses: int = 0
    departures: int = 0

    def add(self, other: PassCounts) -> None:
        self.moved_bytes += other.moved_bytes
        self.hits += other.hits
        self.misses += other.misses
        self.departures += other.departures


@dataclass
class Meter:
    """Counts and times for one session. A hit is a block that was fetched, or on its way, before it was asked for."""

    device: Device
    passes: int = 0
    broken_passes: int = 0
    current: PassCounts = field(default_factory=PassCounts)
    last: PassCounts = field(default_factory=PassCounts)
    total: PassCounts = field(default_factory=PassCounts)
    times: dict[int, BlockTimes] = field(default_factory=dict)
    _visits: dict[int, list[Visit]] = field(default_factory=dict)

    def visit(self, index: int) -> Visit:
        """Give the events for the next stay of block `index`; of two sets the one used longer ago, read first."""
        pair = self._visits.get(index)
        if pair is None:
            pair = self._visits[index] = [Visit(self.device), Visit(self.device)]
            self.times.setdefault(index, BlockTimes())
        pair.reverse()
        oldest = pair[0]
        if oldest.was_used and oldest.done.query():
            self.times[index].add(oldest)
        oldest.was_used = False
        return oldest

    def finish_pass(self, whole: bool) -> None:
        """Close the counts of the pass; one that broke off is counted apart and leaves `last` as it was."""
        self.total.add(self.current)
        if whole:
            self.passes += 1
            self.last = self.current
        else:
            self.broken_passes += 1
        self.current = PassCounts()

    def link_share(self) -> float | None:
        """Time the link is busy against the time the blocks take, near 1 where the link is what limits a pass.

        None until every block that streams was measured.
        """
        times = self.times.values()
        if not times or not all(block.is_measured for block in times):
            return None
        busy_ms = sum(block.copy_ms or 0.0 for block in times)
        taken_ms = sum(part or 0.0 for block in times for part in (block.wait_ms, block.restore_ms, block.compute_ms))
        return busy_ms / taken_ms if taken_ms else None

    def forget_times(self) -> None:
        """Drop times and events: the plan they belong to is gone."""
        self.times.clear()
        self._visits.clear()
