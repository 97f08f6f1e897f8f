"""Memory for slabs is exactly as large as asked, zero, and there before anyone touches it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from layerstream.streaming.engine import pages

MIB = 1024**2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("size_bytes", [1, 4097, 3 * MIB + 5, 2 * pages.POPULATE_BYTES + 1])
def test_pages_are_zero_and_ones_own(size_bytes):
    first, second = pages.anonymous_pages(size_bytes), pages.anonymous_pages(size_bytes)
    assert first.numel() == size_bytes and not first.any()
    first.fill_(7)
    assert not second.any()
    assert torch.equal(first, torch.full_like(first, 7))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_pages_are_there_before_they_are_touched():
    before = resident_bytes()
    memory = pages.anonymous_pages(160 * MIB)
    assert resident_bytes() - before > 0.9 * memory.nbytes


def test_a_system_that_refuses_gives_pages_as_they_are_touched(monkeypatch):
    monkeypatch.setattr(pages, "POPULATE_WRITE", 12345)
    memory = pages.anonymous_pages(MIB)
    assert not memory.any()
