"""How long a piece of work takes on a device, without what the host does meanwhile, and how fast its memory is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

UNCOUNTED = 3


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> list[float]:
    """Times of `work`, after a few runs that are not counted."""
    for _ in range(UNCOUNTED):
        work()
    return list(_card_times(work, repeats) if device.type == "cuda" else _clock_times(work, repeats))


def memory_bytes_per_s(device: torch.device, size_bytes: int) -> float:
    """The rate at which the device copies `size_bytes` in its own memory, reads and writes counted."""
    memory = torch.empty(2 * size_bytes, dtype=torch.uint8, device=device)
    times = seconds(lambda: memory[:size_bytes].copy_(memory[size_bytes:]), device)
    return 2 * size_bytes / statistics.median(times)


def _card_times(work: Callable[[], object], repeats: int) -> Iterator[float]:
    """Each run is queued behind another: the host's part of a call is not timed unless it waits for the card."""
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        work()
        begin.record()
        work()
        end.record()
        end.synchronize()
        yield begin.elapsed_time(end) / 1000


def _clock_times(work: Callable[[], object], repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        yield time.perf_counter() - begin
