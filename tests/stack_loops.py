"""Loops of calls at every place of Python's stack, for what `engine/python_stack.py` promises.

In: where to run them. Out: the pages that the system had to give meanwhile.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import pytest

resource = pytest.importorskip("resource")

CALLS = 100
SLOTS = range(4, 8192, 4)

maps_anew = platform.python_implementation() == "CPython" and sys.version_info[:2] in ((3, 11), (3, 12))
"""Whether this Python is known to map a chunk in each call across the end of one; later ones keep it, from some release
on."""


def _leaf() -> None:
    pass


def loop() -> int:
    """Call CALLS times; give the pages that it took."""
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
