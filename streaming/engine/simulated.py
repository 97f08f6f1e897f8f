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

import numpy
import torch

from .packing import Packer

POISON = 0xFF  # all bits set is NaN in bf16, fp16, fp32 and both fp8 formats


class OrderingError(AssertionError):
    """The engine copied into memory that compute may still be reading."""


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
        elif self.chance.random() < 0.3:
            self.run_until(self.done + self.chance.randint(0, len(self.pending)))
        return position

    def run_until(self, position: int) -> None:
        while self.done < position:
            work = self.pending.popleft()
            self.done += 1
            work()

    def wait_event(self, event: SimulatedEvent) -> None:
        if event.stream is None:
            return
        self.seen[event.stream] = max(self.seen.get(event.stream, 0), event.position)
        # Waiting is itself work of this stream: what stands before it must not be held up.
        self.append(event.synchronize)

    def synchronize(self) -> None:
        self.run_until(self.done + len(self.pending))


class SimulatedDevice:
    """Device memory of `budget_bytes` on the host, for tests and for showing streaming without an accelerator."""

    name = "simulated"
    holds_activations = False
    assumed_restore = 1e9
    torch_device = torch.device("cpu")

    def __init__(
        self, budget_bytes: int, seed: int = 0, packer: Packer | None = None, has_clock: bool = False
    ) -> None:
        """`has_clock` says that times shall be believed, which makes plans depend on chance."""
        self.budget_bytes = budget_bytes
        self.packer = packer
        self.has_clock = has_clock
        self.used_bytes = 0
        self.copied_bytes = 0
        self.locked_bytes = 0
        self._peak_bytes = 0
        self._chance = random.Random(seed)
        self._compute = SimulatedStream(deferred=False, chance=self._chance)
        # (first byte, end, work): until when compute reads there; entries a copy has waited for are dropped
        self._reads: list[tuple[int, int, int]] = []
        self._locked: dict[int, int] = {}

    def allocate(self, size_bytes: int) -> torch.Tensor:
        if self.used_bytes + size_bytes > self.budget_bytes:
            raise torch.OutOfMemoryError(
                f"simulated device: {size_bytes} bytes asked for, {self.free_bytes()} of {self.budget_bytes} free"
            )
        memory = numpy.full(size_bytes, POISON, dtype=numpy.uint8)
        self.used_bytes += size_bytes
        self._peak_bytes = max(self._peak_bytes, self.used_bytes)
        # Whoever had this memory before may still be reading it on the compute stream, as on a real device.
        self._reads.append((memory.ctypes.data, memory.ctypes.data + size_bytes, self._compute.done))
        weakref.finalize(memory, self._give_back, memory.ctypes.data, size_bytes)
        with torch.inference_mode(False):
            return torch.from_numpy(memory)

    def _give_back(self, address: int, size_bytes: int) -> None:
        self.used_bytes -= size_bytes
        self._reads = [read for read in self._reads if read[1] <= address or address + size_bytes <= read[0]]

    def copy(
        self, destination: torch.Tensor, source: torch.Tensor, stream: SimulatedStream, compute: SimulatedStream
    ) -> None:
        start, end = destination.data_ptr(), destination.data_ptr() + destination.nbytes
        touched = [read for read in self._reads if read[0] < end and start < read[1]]
        if stream is not self._compute and any(stream.seen.get(self._compute, 0) < read[2] for read in touched):
            raise OrderingError("a copy was issued into memory without waiting for the compute that reads it")
        self._reads = [read for read in self._reads if read[0] < start or end < read[1] or read not in touched]
        self.copied_bytes += destination.nbytes
        stream.append(lambda: destination.copy_(source))

    def note_read(self, memory: torch.Tensor) -> None:
        self._reads.append((memory.data_ptr(), memory.data_ptr() + memory.nbytes, self._compute.done))

    def discard(self, memory: torch.Tensor) -> None:
        memory.fill_(POISON)

    def copy_stream(self) -> SimulatedStream:
        return SimulatedStream(deferred=True, chance=self._chance)

    def compute_stream(self) -> SimulatedStream:
        return self._compute

    def event(self, is_timed: bool = False) -> SimulatedEvent:
        return SimulatedEvent()

    def page_lock(self, memory: torch.Tensor) -> bool:
        self._locked[memory.data_ptr()] = memory.nbytes
        self.locked_bytes += memory.nbytes
        return True

    def page_unlock(self, address: int) -> None:
        self.locked_bytes -= self._locked.pop(address)

    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def peak_bytes(self) -> int:
        return self._peak_bytes

    def unused_bytes(self) -> int:
        return self.free_bytes()

    def trim(self) -> None:
        pass  # its memory has no holes
