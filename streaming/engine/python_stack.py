"""Room on Python's own stack for whatever a run calls, however deep its loops are.

In: a function. Out: what it returns.

Since 3.11, CPython keeps the frames of Python functions in chunks of 16 KiB, which it maps when a call needs another
and unmaps when that call returns. A loop that happens to run just below the end of a chunk maps and unmaps one in every
call: FLUX.1 fp8, streamed, did so 900 to 3,500 times a step, at 18 us each. Releases from the spring of 2026 on keep
one chunk for the next time; 3.12 and older never will (python/cpython#142183).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# A frame of 128 KiB, in slots of 8 bytes, has CPython map twice as much, the next power of two: the other half is for
# what is called. Only pages that are touched take memory.
FRAME_SLOTS = 16 * 1024


def on_one_chunk(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` where what it calls in turn has 128 KiB of Python's stack in one piece."""
    return function(*args, **kwargs)


on_one_chunk.__code__ = on_one_chunk.__code__.replace(co_stacksize=FRAME_SLOTS)
