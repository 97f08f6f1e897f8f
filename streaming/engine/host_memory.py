"""How much of host memory all models together take, and whose pages are locked.

In: memory that someone is about to use for good, and ceilings that may change at any time. Out: claims, which count it
and lock its pages, and a refusal with a remedy where there is no room. Nothing is allocated or written here.

Locking takes longer than reading from the system's cache of files, so a thread of its own does it, once the pages are
there, while slabs are filled.
"""

from __future__ import annotations

import enum
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import torch

from .device import Device
from .pages import fetch_pages, populate

GIB = 1024**3

logger = logging.getLogger("layerstream")


class HostMemoryFull(ValueError):
    """A ceiling on host memory, or the system, leaves no room for a slab; the message says what would."""


class Ceilings(NamedTuple):
    """The most bytes that slabs may lock, take at all, and take where they hold copies of what can be read from its
    file again; None for no bound.
    """

    locked_bytes: int | None = None
    total_bytes: int | None = None
    copies_bytes: int | None = None


class Use(enum.Enum):
    """What memory is claimed for: a slab; a buffer, which is small, and what the rest is copied by, so that it is
    locked at once, above the ceiling too, and not refused; or pages that the system keeps of a file anyway.
    """

    SLAB = enum.auto()
    BUFFER = enum.auto()
    FILE = enum.auto()


class Closable(Protocol):
    def close(self) -> None: ...


class Spare(Protocol):
    """Claimed memory that its owner can do without."""

    size_bytes: int

    def give_up(self) -> None:
        """End the claims on all of it."""


class HostMemory:
    """What the slabs of all models together take, against ceilings that may change at any time."""

    def __init__(self, ceilings: Callable[[], Ceilings] = Ceilings) -> None:
        self._ceilings = ceilings
        self.total_bytes = 0
        self.locked_bytes = 0
        """Locked, or about to be."""
        self.file_bytes = 0
        """Pages of files among them, which the system takes to be free when it is asked how much is."""
        self.spares: weakref.WeakSet[Spare] = weakref.WeakSet()
        """What makes way as soon as anything else asks for its room; it counts as room."""
        self._counting = threading.RLock()  # a slab may be collected, and counted, in the midst of counting
        self._locker = ThreadPoolExecutor(1, thread_name_prefix="layerstream-locking")

    @property
    def spare_bytes(self) -> int:
        return sum(spare.size_bytes for spare in list(self.spares))

    def has_room(self, size_bytes: int) -> bool:
        most_bytes = self._ceilings().total_bytes
        return most_bytes is None or self.total_bytes - self.spare_bytes + size_bytes <= most_bytes

    def room_for_copies(self) -> float:
        """Bytes more that copies of what can be read from its file again may take, negative where slabs take too much
        already.
        """
        _, *bounds = self._ceilings()
        return self._left_of(bounds) + self.spare_bytes

    def may_lock(self, size_bytes: int, left_bytes: int = 0) -> bool:
        """Whether so many bytes more can be locked with nobody making way, and `left_bytes` be left of all ceilings."""
        locked_bytes, *bounds = self._ceilings()
        lockable_bytes = math.inf if locked_bytes is None else locked_bytes - self.locked_bytes
        return size_bytes + left_bytes <= min(lockable_bytes, self._left_of(bounds))

    def _left_of(self, bounds: Iterable[int | None]) -> float:
        return min((most_bytes - self.total_bytes for most_bytes in bounds if most_bytes is not None), default=math.inf)

    def take(self, memory: torch.Tensor, device: Device, use: Use = Use.SLAB) -> Future[bool]:
        """Count `memory` and begin to lock its pages if the ceiling allows it; the result is whether they are locked.

        Raises HostMemoryFull.
        """
        size_bytes = memory.nbytes
        if self.spare_bytes and use is not Use.BUFFER and not self.may_lock(size_bytes):
            for spare in list(self.spares):
                spare.give_up()
        most_bytes, total_bytes, _ = self._ceilings()
        if use is not Use.BUFFER and total_bytes is not None and self.total_bytes + size_bytes > total_bytes:
            raise HostMemoryFull(
                f"streaming takes {(self.total_bytes + size_bytes) / GIB:.2f} GiB of RAM and more, and the budget "
                f"allows {total_bytes / GIB:.2f} GiB: raise ram_gb, or stream less by raising vram_gb"
            )
        may_lock = use is Use.BUFFER or most_bytes is None or self.locked_bytes + size_bytes <= most_bytes
        with self._counting:
            self.total_bytes += size_bytes
            self.locked_bytes += size_bytes * may_lock
            self.file_bytes += size_bytes * (use is Use.FILE)
        locked: Future[bool] = Future()
        if not may_lock:  # what is refused shall take no pages either
            locked.set_result(False)
            return locked
        cleared: list[Future[None]] = []
        if use is Use.FILE:
            fetch_pages(memory)
        else:
            cleared = populate(memory)
        if use is not Use.BUFFER:
            return self._locker.submit(self._lock, memory, device, use, cleared)
        locked.set_result(self._lock(memory, device, use, cleared))
        return locked

    def _lock(self, memory: torch.Tensor, device: Device, use: Use, cleared: list[Future[None]]) -> bool:
        size_bytes = memory.nbytes
        wait(cleared)
        try:
            is_locked = device.page_lock(memory, is_file=use is Use.FILE)
        except RuntimeError as error:  # the device fails in all things, which whoever uses it will say
            logger.debug("page-locking failed: %s", error)
            is_locked = False
        if not is_locked:
            with self._counting:
                self.locked_bytes -= size_bytes
        return is_locked

    def close_soon(self, closable: Closable) -> None:
        """Close what nobody waits for the memory of, by the thread that locks: the device is waited for."""
        self._locker.submit(closable.close)

    def settle(self) -> None:
        """Wait until all is closed that was to be soon."""
        self._locker.submit(int).result()

    def give_back(self, size_bytes: int, address: int, locking: Future[bool], device: Device, use: Use) -> None:
        """End what `take` began with memory at `address`.

        The thread that locks must not come here for memory that it has still to lock: whoever loads waits for it before
        a slab can be collected.
        """
        is_locked = locking.result()
        if is_locked:
            device.page_unlock(address)
        with self._counting:
            self.total_bytes -= size_bytes
            self.locked_bytes -= size_bytes * is_locked
            self.file_bytes -= size_bytes * (use is Use.FILE)


class Claim:
    """Memory that is counted, and whose pages are locked or about to be, until it is closed or nobody has it.

    Raises HostMemoryFull.
    """

    def __init__(self, memory: torch.Tensor, device: Device, host_memory: HostMemory, use: Use = Use.SLAB) -> None:
        self._locking = host_memory.take(memory, device, use)
        # Unlocking must come before the pages go away, so it hangs on the claim and not on the memory.
        began = memory.nbytes, memory.data_ptr(), self._locking, device, use
        self._give_back = weakref.finalize(self, host_memory.give_back, *began)

    @property
    def is_locked(self) -> bool:
        """Whether the pages are locked; waits until that is done, or was refused."""
        return self._locking.result()

    def close(self) -> None:
        """Unlock the pages; safe to call twice."""
        self._give_back()
