"""Loops of calls at every place of Python's stack, for what `engine/python_stack.py` promises.

In: where to run them. Out: the pages that the system had to give meanwhile.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import pytest

CALLS = 100
SLOTS = range(4, 8192, 4)

KEPT_SINCE = {13: (3, 13, 13), 14: (3, 14, 4)}
"""The releases of older versions that keep a chunk, by the second number."""

maps_anew = platform.python_implementation() == "CPython" and (
    (3, 11) <= sys.version_info[:3] < KEPT_SINCE.get(sys.version_info.minor, (3, 15))
)
"""Whether this Python maps a chunk in each call across the end of one."""


def _leaf() -> None:
    pass


def loop() -> int:
    """Call CALLS times; give the pages that it took."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(CALLS):
        _leaf()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def most_faults(run: Callable[[], int] = loop) -> int:
    """The most that `run` takes of all places within 64 KiB of where this is called, where a chunk ends or two do."""

    def behind() -> int:
        return run()

    faults = []
    for slots in SLOTS:
        behind.__code__ = behind.__code__.replace(co_stacksize=slots)
        faults.append(behind())
    return max(faults)
