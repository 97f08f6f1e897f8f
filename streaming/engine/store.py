"""Host memory: one exact-size, page-locked slab a block.

In: sizes, and ceilings for all models together. Out: slabs, uint8 tensors whose pages the device can read at full link
speed. What is written into a slab is the session's business.

Locking takes longer than reading from the system's cache of files, so a thread of its own does it while slabs are
filled.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from .device import Device, Event
from .packing import Layout
from .pages import anonymous_pages, populate

GIB = 1024**3

# Pages of packed bytes have room for one in so many more, so that what is packed anew needs no others.
SPARE_SHARE = 128

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


class HostMemory:
    """What the slabs of all models together take, against ceilings that may change at any time."""

    def __init__(self, ceilings: Callable[[], Ceilings] = Ceilings) -> None:
        self._ceilings = ceilings
        self.total_bytes = 0
        self.locked_bytes = 0
        """Locked, or about to be."""
        self._counting = threading.RLock()  # a slab may be collected, and counted, in the midst of counting
        self._locker = ThreadPoolExecutor(1, thread_name_prefix="layerstream-locking")

    def has_room(self, size_bytes: int) -> bool:
        most_bytes = self._ceilings().total_bytes
        return most_bytes is None or self.total_bytes + size_bytes <= most_bytes

    def room_for_copies(self) -> float:
        """Bytes more that copies of what can be read from its file again may take, negative where slabs take too much
        already.
        """
        _, *bounds = self._ceilings()
        return min((most_bytes - self.total_bytes for most_bytes in bounds if most_bytes is not None), default=math.inf)

    def take(self, memory: torch.Tensor, device: Device, is_buffer: bool = False) -> Future[bool]:
        """Count `memory` and begin to lock its pages if the ceiling allows it; the result is whether they are locked.

        A buffer is small, and what the rest is copied by: it is locked at once, above the ceiling too, and not refused.
        Raises HostMemoryFull.
        """
        size_bytes = memory.nbytes
        if not is_buffer and not self.has_room(size_bytes):
            most_gib = (self._ceilings().total_bytes or 0) / GIB
            raise HostMemoryFull(
                f"streaming takes {(self.total_bytes + size_bytes) / GIB:.2f} GiB of RAM and more, and the budget "
                f"allows {most_gib:.2f} GiB: raise ram_gb, or stream less by raising vram_gb"
            )
        most_bytes = self._ceilings().locked_bytes
        may_lock = is_buffer or most_bytes is None or self.locked_bytes + size_bytes <= most_bytes
        with self._counting:
            self.total_bytes += size_bytes
            self.locked_bytes += size_bytes * may_lock
        if may_lock:
            populate(memory)  # not before: what is refused shall take nothing
            if not is_buffer:
                return self._locker.submit(self._lock, memory, device)
        locked: Future[bool] = Future()
        locked.set_result(may_lock and self._lock(memory, device))
        return locked

    def _lock(self, memory: torch.Tensor, device: Device) -> bool:
        size_bytes = memory.nbytes
        try:
            is_locked = device.page_lock(memory)
        except RuntimeError as error:  # the device fails in all things, which whoever uses it will say
            logger.debug("page-locking failed: %s", error)
            is_locked = False
        if not is_locked:
            with self._counting:
                self.locked_bytes -= size_bytes
        return is_locked

    def give_back(self, size_bytes: int, address: int, locking: Future[bool], device: Device) -> None:
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


class Slab:
    """Page-locked bytes of one block, from byte `base` of its layout to the block's end; packed if it has a `layout`.

    `stored` is what is in use of them: what is packed anew, with other changes, seldom has the same size to the byte.
    Tensors that view a slab keep its memory alive after the slab is closed; it is ordinary memory then.
    """

    def __init__(
        self,
        device: Device,
        host_memory: HostMemory,
        base: int,
        size_bytes: int,
        layout: Layout | None = None,
        is_buffer: bool = False,
    ) -> None:
        self.base = base
        self.layout = layout
        self._memory = _pages(size_bytes if layout is None else packed_slab_bytes(size_bytes))
        self.stored = self._memory[:size_bytes]
        self._locking = host_memory.take(self._memory, device, is_buffer)
        # Unlocking must come before the pages go away, so it hangs on the slab and not on its memory.
        began = self.size_bytes, self._memory.data_ptr(), self._locking, device
        self._give_back = weakref.finalize(self, host_memory.give_back, *began)

    @property
    def size_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def is_locked(self) -> bool:
        """Whether the pages are locked; waits until that is done, or was refused."""
        return self._locking.result()

    def pack_anew(self, layout: Layout) -> bool:
        """Have room for other packed bytes in place of those it holds; False if they do not fit."""
        if self.layout is None or layout.stored_bytes > self.size_bytes:
            return False
        self.layout, self.stored = layout, self._memory[: layout.stored_bytes]
        return True

    def close(self) -> None:
        """Unlock the pages; safe to call twice."""
        self._give_back()


def _pages(size_bytes: int) -> torch.Tensor:
    try:
        return anonymous_pages(size_bytes)
    except OSError as error:  # Windows gives no more than RAM and page file hold, touched or not
        raise HostMemoryFull(
            f"the system refuses {size_bytes / GIB:.2f} GiB more of RAM for streaming ({error}): close other programs, "
            "let the page file grow, or stream less by raising vram_gb"
        ) from error


class Buffer:
    """Page-locked memory that bytes pass through, free for others once `sent` was reached."""

    def __init__(self, device: Device, host_memory: HostMemory, size_bytes: int) -> None:
        self.slab = Slab(device, host_memory, 0, size_bytes, is_buffer=True)
        self.sent: Event = device.event()


def packed_slab_bytes(stored_bytes: int) -> int:
    """What a slab for so many packed bytes takes."""
    return stored_bytes + stored_bytes // SPARE_SHARE


class HostStore:
    """The slabs of one model, by block index."""

    def __init__(self, device: Device, host_memory: HostMemory) -> None:
        self._device = device
        self.host_memory = host_memory
        self._slabs: dict[int, Slab] = {}
        self._locking: list[Slab] = []
        self._warned = False
        # Kept up to date instead of added up: they are read several times a second, by other threads, to be shown.
        self.host_bytes = 0
        self.page_locked_bytes = 0

    def __getitem__(self, index: int) -> Slab:
        return self._slabs[index]

    def get(self, index: int) -> Slab | None:
        return self._slabs.get(index)

    def has_room(self, size_bytes: int) -> bool:
        return self.host_memory.has_room(size_bytes)

    def bytes_beside(self, indices: Container[int]) -> int:
        """What the slabs of other blocks than those of `indices` take."""
        return sum(slab.size_bytes for index, slab in self._slabs.items() if index not in indices)

    def build(self, index: int, base: int, size_bytes: int, layout: Layout | None = None) -> Slab:
        """Make the slab of block `index`; its old one, if any, must have been dropped."""
        assert index not in self._slabs
        slab = Slab(self._device, self.host_memory, base, size_bytes, layout)
        self._slabs[index] = slab
        self._locking.append(slab)
        self.host_bytes += slab.size_bytes
        return slab

    def finish(self) -> None:
        """Wait until all slabs are locked that can be."""
        for slab in self._locking:
            self.page_locked_bytes += slab.size_bytes * slab.is_locked
            if not slab.is_locked and not self._warned:
                self._warned = True
                logger.warning(
                    "LayerStream: no more host memory can be page-locked, so some blocks are copied at a fraction of "
                    "the link's speed; close other programs, or raise ram_gb on a VRAM Budget node"
                )
        self._locking.clear()

    def build_packed(self, index: int, base: int, layout: Layout) -> Slab:
        """The slab of block `index` for packed bytes, in the pages of the packed bytes it had if there were such."""
        slab = self.get(index)
        if slab is not None and slab.pack_anew(layout):
            return slab
        self.drop(index)
        return self.build(index, base, layout.stored_bytes, layout)

    def drop(self, index: int) -> None:
        slab = self._slabs.pop(index, None)
        if slab is None:
            return
        if slab in self._locking:
            self._locking.remove(slab)
        else:
            self.page_locked_bytes -= slab.size_bytes * slab.is_locked
        self.host_bytes -= slab.size_bytes
        slab.close()

    def close(self) -> None:
        for index in list(self._slabs):
            self.drop(index)
