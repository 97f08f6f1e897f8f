"""Counters and timings of a stream of passes.

In: what the pipeline does, as it does it. Out: readings. Every pass is counted. Some passes are timed: the second and
third under a plan whose times are wanted, when everything that happens once has happened; under any other the second;
and every so often after them. Events are read when they are long past; only those that are wanted are waited for.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .device import Device, Event, Stream
from .forecast import Rates

# Passes under a plan before the first one that is timed, those timed then at once, and of how many one is timed later.
WARMUP_PASSES = 1
FIRST_TIMED = 2
TIMED_EVERY = 16

# Copies smaller than this say more of latency than of the link.
TELLING_COPY_BYTES = 4 * 1024**2


class Visit:
    """The events of one block's run in a timed pass; one that need not be brought runs as soon as it is asked for."""

    __slots__ = ("asked", "done", "index", "running")

    def __init__(self, index: int, events: list[Event]) -> None:
        self.index = index
        self.asked, self.done = events[0], events[-1]
        self.running = events[-2]


class Transfer:
    """The events of one block's copy, or of its being restored, in a timed pass."""

    __slots__ = ("begun", "ended", "index", "size_bytes")

    def __init__(self, index: int, size_bytes: int, events: list[Event]) -> None:
        self.index = index
        self.size_bytes = size_bytes
        self.begun, self.ended = events


@dataclass
class BlockTimes:
    """One block in one pass, milliseconds; a block that runs several times has the sums."""

    uses: int = 0
    """How often it ran, at once after itself not counted: it is brought once for that."""
    lead_ms: float = 0.0
    """Compute between the block before and this one."""
    wait_ms: float = 0.0
    compute_ms: float = 0.0
    restore_ms: float = 0.0
    """Restoring and copying run beside compute."""
    copy_ms: float = 0.0


@dataclass
class PassTimes:
    """One timed pass, from its beginning to the beginning of the next one; milliseconds."""

    pass_ms: float = 0.0
    tail_ms: float = 0.0
    restored_bytes: int = 0
    link: float = 0.0
    """Bytes a millisecond of the median copy: one that was held up says nothing of the link."""
    blocks: dict[int, BlockTimes] = field(default_factory=dict)

    @property
    def busy_ms(self) -> float:
        """What compute takes of the pass, in blocks and between them."""
        return self.total_ms("compute_ms") + self.total_ms("lead_ms") + self.tail_ms

    def total_ms(self, part: str) -> float:
        """Sum of `part` (an attribute of `BlockTimes`) over the blocks."""
        return sum(getattr(block, part) for block in self.blocks.values())

    def at_best(self, other: PassTimes) -> PassTimes:
        """These times, each compute and lead no longer than in `other`: what held one pass up says nothing."""
        blocks = {
            index: replace(
                block,
                lead_ms=min(block.lead_ms, other.blocks[index].lead_ms),
                compute_ms=min(block.compute_ms, other.blocks[index].compute_ms),
            )
            if index in other.blocks
            else block
            for index, block in self.blocks.items()
        }
        return replace(self, tail_ms=min(self.tail_ms, other.tail_ms), blocks=blocks)


@dataclass
class PassCounts:
    """What happened in one pass, or in all of them.

    A hit is a block that was fetched, or on its way, before it was asked for. A departure is one that was not
    predicted. One that found no place, since it ran inside another block, was left on the host.
    """

    moved_bytes: int = 0
    hits: int = 0
    misses: int = 0
    departures: int = 0
    unplaced: int = 0

    def add(self, other: PassCounts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Meter:
    """Counts and times for one session."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.passes = 0
        self.broken_passes = 0
        self.current = PassCounts()
        self.last = PassCounts()
        self.total = PassCounts()
        self.times: PassTimes | None = None
        """The latest timed pass; it outlives the plan under which it was timed."""
        self.best: PassTimes | None = None
        """The same at its best in all passes that were timed since `take_times`, for plans."""
        self.rates: Rates | None = None
        self.is_timing = False
        self._passes_of_plan = 0
        self._first_timed = FIRST_TIMED
        self._visits: list[Visit] = []
        self._copies: list[Transfer] = []
        self._restores: list[Transfer] = []
        self._begun: Event = device.event(is_timed=True)
        self._ended: Event = device.event(is_timed=True)
        self._is_open = self._is_closed = False
        self._spare: list[Event] = []

    # -- what the pipeline tells ---------------------------------------------------------------------------------

    def begin_pass(self, compute: Stream) -> None:
        """Begin a pass, which ends the timing of the one before; decide whether this one is timed."""
        self.close_trace(compute)
        place = self._passes_of_plan - WARMUP_PASSES
        self.collect(wait=0 < place < self._first_timed)
        self.is_timing = (0 <= place < self._first_timed or place % TIMED_EVERY == 0) and not self._is_closed
        if self.is_timing:
            self._is_open = True
            self._begun.record(compute)

    def visit(self, index: int, is_moving: bool = True) -> Visit | None:
        """The events for a block that runs now; None in a pass that is not timed."""
        if not self.is_timing:
            return None
        visit = Visit(index, self._events(3 if is_moving else 2))
        self._visits.append(visit)
        return visit

    def copy(self, index: int, size_bytes: int) -> Transfer | None:
        """Count a copy and give the events for it; None in a pass that is not timed."""
        self.current.moved_bytes += size_bytes
        return self._transfer(self._copies, index, size_bytes)

    def restore(self, index: int, raw_bytes: int) -> Transfer | None:
        """The events for restoring a block to so many bytes; None in a pass that is not timed."""
        return self._transfer(self._restores, index, raw_bytes)

    def _transfer(self, transfers: list[Transfer], index: int, size_bytes: int) -> Transfer | None:
        if not self.is_timing:
            return None
        transfer = Transfer(index, size_bytes, self._events(2))
        transfers.append(transfer)
        return transfer

    def finish_pass(self, whole: bool) -> None:
        """Close the counts of the pass; one that broke off is counted apart and leaves `last` as it was."""
        self.total.add(self.current)
        if whole:
            self.passes += 1
            self._passes_of_plan += 1
            self.last = self.current
        else:
            self.broken_passes += 1
            self._drop_trace()
        self.current = PassCounts()
        self.is_timing = False

    def begin_plan(self, is_known: bool) -> None:
        """Start over with a new plan; what was measured under the old one stays until this one is measured, which is
        for later where it is known what passes take.
        """
        self._passes_of_plan = 0
        self._first_timed = 0 if is_known else FIRST_TIMED
        self._drop_trace()

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """True when the first timed passes of a plan have run and the last of them was not read."""
        return self._is_open and self._passes_of_plan == WARMUP_PASSES + self._first_timed

    def close_trace(self, compute: Stream) -> None:
        """End the timing of the last timed pass: another one begins, or none follows."""
        if self._is_open:
            self._ended.record(compute)
            self._is_open, self._is_closed = False, True

    def collect(self, wait: bool = False) -> None:
        """Read the trace of a timed pass if the device is past it; with `wait`, wait for that."""
        if not self._is_closed:
            return
        if wait:
            self._ended.synchronize()
        elif not self._ended.query() or not all(transfer.ended.query() for transfer in self._transfers()):
            return
        for transfer in self._transfers():
            transfer.ended.synchronize()
        self._read()
        self._drop_trace()

    def _transfers(self) -> Iterator[Transfer]:
        return itertools.chain(self._copies, self._restores)

    def _read(self) -> None:
        if not self._visits:
            return
        times = PassTimes(pass_ms=self._begun.elapsed_time(self._ended))
        last, last_index = self._begun, None
        for visit in self._visits:
            block = times.blocks.setdefault(visit.index, BlockTimes())
            block.uses += visit.index != last_index
            block.lead_ms += last.elapsed_time(visit.asked)
            block.wait_ms += 0.0 if visit.running is visit.asked else visit.asked.elapsed_time(visit.running)
            block.compute_ms += visit.running.elapsed_time(visit.done)
            last, last_index = visit.done, visit.index
        times.tail_ms = last.elapsed_time(self._ended)
        for restore in self._restores:
            times.blocks.setdefault(restore.index, BlockTimes()).restore_ms += restore.begun.elapsed_time(restore.ended)
            times.restored_bytes += restore.size_bytes
        rates = []
        for copy in self._copies:
            copy_ms = copy.begun.elapsed_time(copy.ended)
            times.blocks.setdefault(copy.index, BlockTimes()).copy_ms += copy_ms
            if copy.size_bytes >= TELLING_COPY_BYTES and copy_ms > 0:
                rates.append(copy.size_bytes / copy_ms)
        times.link = statistics.median(rates) if rates else 0.0
        self.times = times
        self.best = times if self.best is None else times.at_best(self.best)
        self._note_rates(times)

    def take_times(self, times: PassTimes | None) -> None:
        """Take note that passes take other times from now on, `times` if they are known."""
        self.best = times
        self.begin_plan(times is not None)

    def _note_rates(self, times: PassTimes) -> None:
        """Work out `rates`; what this pass did not show is as before, or as assumed."""
        restore_ms = times.total_ms("restore_ms")
        link = times.link or (self.rates.link if self.rates else 0.0)
        restore = self.rates.restore if self.rates else self._device.assumed_restore
        if times.restored_bytes and restore_ms > 0:
            restore = times.restored_bytes / restore_ms
        if link:
            self.rates = Rates(link, restore, max(0.0, (self.best or times).tail_ms))

    def _events(self, count: int) -> list[Event]:
        while len(self._spare) < count:
            self._spare.append(self._device.event(is_timed=True))
        taken, self._spare = self._spare[:count], self._spare[count:]
        return taken

    def _drop_trace(self) -> None:
        for visit in self._visits:
            self._spare += {visit.asked, visit.running, visit.done}
        for transfer in self._transfers():
            self._spare += (transfer.begun, transfer.ended)
        self._visits, self._copies, self._restores = [], [], []
        self._is_open = self._is_closed = False
