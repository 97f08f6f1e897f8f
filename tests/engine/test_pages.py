"""Memory for slabs is exactly as large as asked, zero, and there before anyone touches it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layerstream.streaming.engine import pages

MIB = 1024**2
REPOSITORY = Path(__file__).parents[2]


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such bounds")
def test_freed_memory_is_taken_again_without_a_fault():
    """In a process of its own: how `malloc` goes on is up to what was freed before."""
    script = """
import ctypes, resource, sys
from scripts.pack import load_pack
load_pack()
from layerstream.streaming.engine.pages import keep_freed_pages
if sys.argv[1] == "kept":
    keep_freed_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100_000))) for _ in range(200)]
    for piece in pieces:
        ctypes.memset(piece, 1, 100_000)
    for piece in pieces:
        libc.free(piece)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for how in ("kept", "as it is"):
        done = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["kept"] < 500 < 4000 < faults["as it is"]


def test_a_system_that_refuses_gives_pages_as_they_are_touched(monkeypatch):
    monkeypatch.setattr(pages, "POPULATE_WRITE", 12345)
    memory = pages.anonymous_pages(MIB)
    assert not memory.any()
