"""Memory for slabs is exactly as large as asked, zero, and there before anyone locks it, unless it is refused."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import wait

import psutil
import pytest
import torch
from layerstream.streaming.engine import pages
from layerstream.streaming.engine.host_memory import Ceilings, HostMemory, HostMemoryFull
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.engine.store import Slab

from scripts.pack import ROOT

MIB = 1024**2


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("size_bytes", [1, 4097, 3 * MIB + 5, 2 * pages.POPULATE_BYTES + 1])
def test_pages_are_zero_and_ones_own(size_bytes):
    first, second = pages.anonymous_pages(size_bytes), pages.anonymous_pages(size_bytes)
    assert first.numel() == size_bytes and not first.any()
    first.fill_(7)
    assert not second.any()
    wait(pages.populate(first))
    assert torch.equal(first, torch.full_like(first, 7))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give pages as they are touched")
def test_pages_are_there_before_they_are_locked():
    before, resident = resident_bytes(), []

    class Locking(SimulatedDevice):
        def page_lock(self, memory: torch.Tensor, is_file: bool = False) -> bool:
            resident.append(resident_bytes() - before)
            return super().page_lock(memory, is_file)

    slab = Slab(Locking(1 << 30), HostMemory(), 0, 160 * MIB)
    assert slab.is_locked and resident[0] > 0.9 * slab.size_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give pages as they are touched")
@pytest.mark.parametrize(
    "ceilings", [Ceilings(total_bytes=MIB), Ceilings(locked_bytes=MIB)], ids=["refused", "unlocked"]
)
def test_memory_beyond_a_ceiling_takes_no_pages(monkeypatch, ceilings):
    before, resident = resident_bytes(), []
    take = HostMemory.take

    def take_and_look(self, *args):
        try:
            return take(self, *args)
        finally:
            resident.append(resident_bytes() - before)

    monkeypatch.setattr(HostMemory, "take", take_and_look)
    try:
        assert not Slab(SimulatedDevice(1 << 30), HostMemory(lambda: ceilings), 0, 160 * MIB).is_locked
    except HostMemoryFull:
        assert ceilings.total_bytes
    assert resident[0] < 16 * MIB


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
    as_it_comes = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for how in ("kept", "as it is"):
        command = [sys.executable, "-c", script, how]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=as_it_comes)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["kept"] < 500 < 4000 < faults["as it is"]


def test_more_than_the_system_has_is_refused_with_a_remedy():
    host_memory = HostMemory()
    with pytest.raises(HostMemoryFull, match=r"refuses 1048576\.00 GiB .* let the page file grow"):
        Slab(SimulatedDevice(1 << 30), host_memory, 0, 1 << 50)
    assert host_memory.total_bytes == 0


def test_a_system_that_refuses_gives_pages_as_they_are_touched(monkeypatch):
    monkeypatch.setattr(pages, "POPULATE_WRITE", 12345)
    memory = pages.anonymous_pages(MIB)
    wait(pages.populate(memory))
    assert not memory.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_bytes_are_copied_and_none_behind_them(dtype):
    source = torch.randint(256, (1001 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    destination = torch.full((source.nbytes + 9,), 7, dtype=torch.uint8)
    pages.copy_alone(source, destination)
    assert torch.equal(destination[: source.nbytes], source.view(torch.uint8)) and (destination[-9:] == 7).all()


def test_memory_that_is_too_small_is_not_written():
    with pytest.raises(AssertionError):
        pages.copy_alone(torch.zeros(10), torch.zeros(39, dtype=torch.uint8))
