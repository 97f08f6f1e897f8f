"""How fast the processor is just now: the time of a fixed loop of pure Python, about 10 ms on a usual machine.

Where a step waits for the processor its time says as much of the processor as of the contender, and a rented one's
speed may nearly halve within a minute. Nothing of the card, of memory or of any library is in the loop.
"""

from __future__ import annotations

import time

TURNS = 200_000
REPEATS = 5

# A loop within this of the fastest met the same processor, as far as a loop can tell.
SLOWER = 1.1


def loop_times_ms() -> list[float]:
    """The loop's time, a few times in a row."""
    return [_loop_ms() for _ in range(REPEATS)]


def _loop_ms() -> float:
    begin = time.perf_counter()
    total = 0
    for number in range(TURNS):
        total = (total * 31 + number) & 0xFFFF
    return (time.perf_counter() - begin) * 1000
