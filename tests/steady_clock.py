"""A clock for simulated cards that does not depend on how busy the machine is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from layerstream.streaming.engine import simulated

TICK_S = 1e-3


def give_steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each event of a simulated card be reached one tick after the one before it, however long that took."""
    ticks = itertools.count()
    monkeypatch.setattr(simulated, "time", SimpleNamespace(perf_counter=lambda: TICK_S * next(ticks)))
