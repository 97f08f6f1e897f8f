"""A device for machines without one, stricter than the real thing.

Its memory is host memory in an arena with an enforced budget. Copies are deferred: they run at a random later moment,
at the latest when someone waits for them, so that reading too early reads NaN. Memory whose contents are discarded is
filled with NaN. A copy into memory whose last reader it was not ordered after is an error, since on a real device it
would be a race. All of it is deterministic for a seed.
"""

from __future__ import annotations

import random
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch

from .packing import Decoder, Layout, Packer

EAGERNESS = 0.15  # how likely a deferred stream is to run some of its work when it is given more

POISON = 0xFF  # all bits set is NaN in bf16, fp16, fp32 and both fp8 formats


class OrderingError(AssertionError):
    """The engine overwrote memory that compute or restoring may still be reading."""


class SimulatedEvent:
    """A point in a simulated stream. Only one that was recorded can be waited for to any effect."""

    def __init__(self) -> None:
        self.stream: SimulatedStream | None = None
        self.position = 0
        self.time_s: float | None = None

    def record(self, stream: SimulatedStream) -> None:
        self.stream = stream
        self.time_s = None
        self.position = stream.append(self._reached)

    def _reached(self) -> None:
        self.time_s = time.perf_counter()

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.position

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run_until(self.position)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        """Milliseconds from this event to `end`, both reached."""
        assert self.time_s is not None and end.time_s is not None
        return (end.time_s - self.time_s) * 1000


class SimulatedStream:
    """Work in order. A deferred stream runs it at random moments, the other at once."""

    def __init__(self, deferred: bool, chance: random.Random) -> None:
        self.pending: deque[Callable[[], object]] = deque()
        self.done = 0
        self.deferred = deferred
        self.chance = chance
        self.seen: dict[SimulatedStream, int] = {}

    def append(self, work: Callable[[], object]) -> int:
        """Queue `work` and give its position; something random of the queue runs now."""
        self.pending.append(work)
        position = self.done + len(self.pending)
        if not self.deferred:
            self.run_until(position)
        elif self.chance.random() < EAGERNESS:
            self.run_until(self.done + self.chance.randint(0, len(self.pending)))
        return position

    def run_until(self, position: int) -> None:
        while self.done < position:
            work = self.pending.popleft()
            self.done += 1
            work()

    def wait_event(self, event: SimulatedEvent) -> None:
        stream, position = event.stream, event.position
        if stream is None:
            return
        self.seen[stream] = max(self.seen.get(stream, 0), position)
        # Waiting is itself work of this stream: what stands before it must not be held up. What is waited for is the
        # event as it is now, whatever is recorded with it later.
        self.append(lambda: stream.run_until(position))

    def synchronize(self) -> None:
        self.run_until(self.done + len(self.pending))


class _Read(NamedTuple):
    """Until which work of a stream the bytes from `start` to `end` are read."""

    start: int
    end: int
    stream: SimulatedStream
    position: int


class SimulatedDevice:
    """Device memory of `budget_bytes` on the host, for tests and for showing streaming without an accelerator."""

    name = "simulated"
    holds_activations = False
    assumed_restore = 1e9
    torch_device = torch.device("cpu")

    def __init__(self, budget_bytes: int, seed: int = 0, packer: Packer | None = None, has_clock: bool = False) -> None:
        """`has_clock` says that times shall be believed, which makes plans depend on chance."""
        self.budget_bytes = budget_bytes
        self._limit_bytes: int | None = None
        self.packer = packer
        self.has_clock = has_clock
        self.used_bytes = 0
        self.copied_bytes = 0
        self._peak_bytes = 0
        self._chance = random.Random(seed)
        self._compute = SimulatedStream(deferred=False, chance=self._chance)
        # Entries that something brought there has waited for are dropped.
        self._reads: list[_Read] = []
        self._locked: dict[int, int] = {}

    def allocate(self, size_bytes: int) -> torch.Tensor:
        if self.used_bytes + size_bytes > self._most_bytes:
            raise torch.OutOfMemoryError(
                f"simulated device: {size_bytes} bytes asked for, {self.free_bytes()} of {self._most_bytes} free"
            )
        memory = numpy.full(size_bytes, POISON, dtype=numpy.uint8)
        self.used_bytes += size_bytes
        self._peak_bytes = max(self._peak_bytes, self.used_bytes)
        start, end = memory.ctypes.data, memory.ctypes.data + size_bytes
        # Whoever had this memory before may still be reading it on the compute stream, as on a real device.
        self._reads.append(_Read(start, end, self._compute, self._compute.done))
        weakref.finalize(memory, self._give_back, start, size_bytes)
        with torch.inference_mode(False):
            return torch.from_numpy(memory)

    def _give_back(self, address: int, size_bytes: int) -> None:
        self.used_bytes -= size_bytes
        self._reads = [read for read in self._reads if read.end <= address or address + size_bytes <= read.start]

    def copy(
        self, destination: torch.Tensor, source: torch.Tensor, stream: SimulatedStream, compute: SimulatedStream
    ) -> None:
        self._overwrite(destination, stream)
        self.copied_bytes += destination.nbytes
        stream.append(lambda: destination.copy_(source))

    def restorer(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> Decoder:
        assert self.packer is not None
        decode = self.packer.decoder(packed, layout, out)

        def restore(stream: SimulatedStream) -> None:
            self._overwrite(out, stream)
            stream.append(lambda: decode(stream))

        return restore

    def _overwrite(self, memory: torch.Tensor, stream: SimulatedStream) -> None:
        """Prove that `stream` has waited for whatever reads `memory`, which it is about to overwrite."""
        start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        touched = [read for read in self._reads if read.start < end and start < read.end]
        if any(read.stream is not stream and stream.seen.get(read.stream, 0) < read.position for read in touched):
            raise OrderingError("memory is overwritten without waiting for what reads it")
        self._reads = [read for read in self._reads if read.start < start or end < read.end or read not in touched]

    def note_read(self, memory: torch.Tensor, stream: SimulatedStream) -> None:
        position = stream.done + len(stream.pending)
        self._reads.append(_Read(memory.data_ptr(), memory.data_ptr() + memory.nbytes, stream, position))

    def discard(self, memory: torch.Tensor, stream: SimulatedStream) -> None:
        stream.append(lambda: memory.fill_(POISON))

    def copy_stream(self) -> SimulatedStream:
        return SimulatedStream(deferred=True, chance=self._chance)

    restore_stream = copy_stream

    def compute_stream(self) -> SimulatedStream:
        return self._compute

    def event(self, is_timed: bool = False) -> SimulatedEvent:
        return SimulatedEvent()

    def page_lock(self, memory: torch.Tensor, is_file: bool = False) -> bool:
        self._locked[memory.data_ptr()] = memory.nbytes
        return True

    def page_unlock(self, address: int) -> None:
        del self._locked[address]

    @property
    def locked_bytes(self) -> int:
        return sum(list(self._locked.values()))  # another thread may lock meanwhile

    def free_bytes(self) -> int:
        return self._most_bytes - self.used_bytes

    def taken_bytes(self) -> int:
        return self.used_bytes

    def spilled_bytes(self) -> int:
        return 0  # what does not fit is refused

    def limit(self, most_bytes: int | None) -> None:
        self._limit_bytes = most_bytes

    @property
    def _most_bytes(self) -> int:
        return self.budget_bytes if self._limit_bytes is None else min(self._limit_bytes, self.budget_bytes)

    def peak_bytes(self) -> int:
        return self._peak_bytes

    def unused_bytes(self) -> int:
        return self.free_bytes()

    def trim(self) -> None:
        pass  # its memory has no holes
