"""Pages of host memory: how the system is asked for them, and told what becomes of them.

In: a size, or where pages lie. Out: memory of exactly that size; the pages of a file where the system keeps them;
advice; an allocator that keeps what it has. Beside them the few threads that work on memory where one would be slower,
because the system copies or clears pages for whoever asks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch

# Beside an H200, eight threads of 16 processors had 30 GiB/s from the system's cache of files, where four had 18, and
# 29 GiB/s of cleared pages instead of 21; more left too little to the thread that loads. On six processors five were
# quicker than six or eight. On two processors two do as well as four, but a disk likes a queue.
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(8, max(4, PROCESSORS - 1))
threads = ThreadPoolExecutor(THREADS, thread_name_prefix="layerstream-pages")

# From <linux/mman.h>; Python has no name for it. Linux before 5.14 refuses it, and gives pages when they are touched.
POPULATE_WRITE = 23
POPULATE_BYTES = 8 * 1024**2
FETCH_BYTES = 32 * 1024**2

# From glibc's <malloc.h>, and the values that glibc itself goes up to as a program frees pieces of that size.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MOST_MMAP_THRESHOLD_BYTES = 32 * 1024**2


@cache
def _system() -> ctypes.CDLL:
    """The system's own functions. Made once: each such object is a class of its own, and there were hundreds a load."""
    system = ctypes.CDLL(None, use_errno=True)
    if hasattr(system, "mmap"):
        system.mmap.restype = ctypes.c_void_p
    return system


def keep_freed_pages() -> None:
    """Have `malloc` keep pages that were freed for who asks next, as far as it would in the end.

    While work waits for copies, up to 10 MiB more are taken in the course of a step than are needed at its end. glibc
    gave them back and took them again in every step: SDXL took 95 to 101 ms a step instead of 76 to 81.
    """
    mallopt = getattr(_system(), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, MOST_MMAP_THRESHOLD_BYTES)
        mallopt(TRIM_THRESHOLD, 2 * MOST_MMAP_THRESHOLD_BYTES)


def advise(address: int, size_bytes: int, advice: int) -> None:
    """Give the system `advice` (`MADV_...`) on the pages from `address` on. Where it is not taken nothing changes."""
    _system().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), advice)


def give_back_mapped(address: int, size_bytes: int) -> None:
    """Have whole pages that are mapped from a file no longer count as this process's memory, where the system can do
    that; whoever reads there again gets them anew.
    """
    if sys.platform == "win32":
        # Pages that are not locked it takes from the working set, as its documentation says; then they are available.
        ctypes.windll.kernel32.VirtualUnlock(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes))
    elif hasattr(mmap, "MADV_DONTNEED"):
        advise(address, size_bytes, mmap.MADV_DONTNEED)


def anonymous_pages(size_bytes: int) -> torch.Tensor:
    """Give a uint8 tensor [size_bytes] on pages of its own.

    torch's page-locked allocator rounds sizes up to powers of two, which costs up to twice the memory, and malloc
    shares pages between neighbours, which cannot be locked and unlocked apart. A private mapping has neither fault and
    its memory goes back to the system at once.
    """
    if sys.platform == "win32":
        pages = mmap.mmap(-1, size_bytes)
    else:
        pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)  # fewer faults while filling, fewer pages to lock
    with torch.inference_mode(False):
        return torch.frombuffer(pages, dtype=torch.uint8)


def file_pages(descriptor: int, offset: int, size_bytes: int) -> torch.Tensor:
    """Give a uint8 tensor on the pages that the system itself keeps of a file, from byte `offset` on, a multiple of
    `mmap.PAGESIZE`: whole pages, to be read only. Only on Linux.

    They are mapped once more for whoever asks, so that each can lock and unlock what it asked for. The file may be
    closed meanwhile. Python's own mappings keep a descriptor open each, of which there are too few.
    Raises OSError where the file cannot be mapped.
    """
    size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    system = _system()
    address = system.mmap(
        None, ctypes.c_size_t(size_bytes), mmap.PROT_READ, mmap.MAP_SHARED, descriptor, ctypes.c_int64(offset)
    )
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    pages = (ctypes.c_ubyte * size_bytes).from_address(address)
    weakref.finalize(pages, system.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size_bytes)).atexit = False
    with torch.inference_mode(False):
        return torch.frombuffer(pages, dtype=torch.uint8)


def fetch_pages(pages: torch.Tensor) -> None:
    """Begin to bring what `file_pages` gave into memory, several pieces at a time: locking them would have the disk
    asked for little at a time.
    """
    for piece in pages.split(FETCH_BYTES):
        threads.submit(advise, piece.data_ptr(), piece.nbytes, mmap.MADV_WILLNEED)


def copy_alone(source: torch.Tensor, destination: torch.Tensor) -> None:
    """Copy the bytes of contiguous host memory in the calling thread, which is quickest while others read.

    torch shares out what has more than 32,768 values among as many threads as there are processors, and waits for each
    of them to get one: on two processors 2 MB took 7 to 13 ms beside eight readers, and take 0.6 to 0.9.
    """
    assert source.is_contiguous() and destination.is_contiguous() and destination.nbytes >= source.nbytes
    ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.nbytes)


def populate(memory: torch.Tensor) -> list[Future[None]]:
    """Begin to have the pages of `memory`, as `anonymous_pages` gives it, there, where the system can do that: locking
    them would have them cleared one after another. The memory must outlive what is given.
    """
    if sys.platform != "linux":
        return []
    pieces = memory.split(POPULATE_BYTES)
    return [threads.submit(advise, piece.data_ptr(), piece.nbytes, POPULATE_WRITE) for piece in pieces]
