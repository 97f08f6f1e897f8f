"""Host memory: one exact-size, page-locked slab a block.

In: sizes. Out: slabs, uint8 tensors whose pages the device can read at full link speed. What is written into a slab is
the session's business.
"""

from __future__ import annotations

import logging
import mmap
import sys
import weakref

import torch

from .device import Device
from .packing import Layout

logger = logging.getLogger("layerstream")


class Slab:
    """Page-locked bytes of one block, from byte `base` of its layout to the block's end; packed if it has a `layout`.

    Tensors that view a slab keep its memory alive after the slab is closed; it is ordinary memory then.
    """

    def __init__(self, device: Device, base: int, size_bytes: int, layout: Layout | None = None) -> None:
        self.base = base
        self.layout = layout
        self.stored = _anonymous_pages(size_bytes)
        self.is_locked = device.page_lock(self.stored)
        # Unlocking must come before the pages go away, so it hangs on the slab and not on its memory.
        self._unlock = (
            weakref.finalize(self, device.page_unlock, self.stored.data_ptr()) if self.is_locked else lambda: None
        )

    @property
    def size_bytes(self) -> int:
        return self.stored.nbytes

    def close(self) -> None:
        """Unlock the pages; safe to call twice."""
        self._unlock()


def _anonymous_pages(size_bytes: int) -> torch.Tensor:
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


class HostStore:
    """The slabs of one model, by block index."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slabs: dict[int, Slab] = {}
        self._warned = False

    def __getitem__(self, index: int) -> Slab:
        return self._slabs[index]

    def get(self, index: int) -> Slab | None:
        return self._slabs.get(index)

    def build(self, index: int, base: int, size_bytes: int, layout: Layout | None = None) -> Slab:
        """Make the slab of block `index`; its old one, if any, must have been dropped."""
        assert index not in self._slabs
        slab = Slab(self._device, base, size_bytes, layout)
        if not slab.is_locked and not self._warned:
            self._warned = True
            logger.warning(
                "LayerStream: the system refuses to page-lock more host memory, so some blocks are copied at a fraction"
                " of the link's speed; close other programs or lower what they lock"
            )
        self._slabs[index] = slab
        return slab

    def drop(self, index: int) -> None:
        slab = self._slabs.pop(index, None)
        if slab is not None:
            slab.close()

    def close(self) -> None:
        for index in list(self._slabs):
            self.drop(index)

    @property
    def host_bytes(self) -> int:
        return sum(slab.size_bytes for slab in self._slabs.values())

    @property
    def page_locked_bytes(self) -> int:
        return sum(slab.size_bytes for slab in self._slabs.values() if slab.is_locked)
