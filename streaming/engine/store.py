"""Host memory: one exact-size, page-locked slab a block.

In: sizes, or where bytes lie in a file, and ceilings for all models together. Out: slabs, uint8 tensors whose pages the
device can read at full link speed. What is written into a slab is the session's business; what the system itself keeps
of a file is locked where it is, and nothing is written.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Container, Sequence
from typing import NamedTuple

import torch

from .device import Device, Event
from .host_memory import GIB, Claim, HostMemory, HostMemoryFull, Use
from .mapped import CAN_LOCK, FileSlice
from .packing import Layout
from .pages import anonymous_pages

# Pages of packed bytes have room for one in so many more, so that what is packed anew needs no others.
SPARE_SHARE = 128

# The least that pieces of a file are worth copying as they lie, on the average: smaller ones are gathered in a slab.
# Copies of 4 MiB have 0.97 of the link's speed, of 1 MiB 0.88, and each takes the processor 9 us.
WORTH_LOCKING_BYTES = 4 * 1024**2

logger = logging.getLogger("layerstream")


class Piece(NamedTuple):
    """Bytes that lie together on the host, and at which byte of what moves of a block they begin."""

    begin: int
    stored: torch.Tensor


class Stretch(NamedTuple):
    """The same where they lie in a file."""

    begin: int
    file: FileSlice


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
        use: Use = Use.SLAB,
    ) -> None:
        self.base = base
        self.layout = layout
        self._memory = _pages(size_bytes if layout is None else packed_slab_bytes(size_bytes))
        self.stored = self._memory[:size_bytes]
        self._claim = Claim(self._memory, device, host_memory, use)

    @property
    def size_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def pieces(self) -> Sequence[Piece]:
        """What is copied to the device."""
        return (Piece(0, self.stored),)

    @property
    def is_locked(self) -> bool:
        """Whether the pages are locked; waits until that is done, or was refused."""
        return self._claim.is_locked

    def pack_anew(self, layout: Layout) -> bool:
        """Have room for other packed bytes in place of those it holds; False if they do not fit."""
        if self.layout is None or layout.stored_bytes > self.size_bytes:
            return False
        self.layout, self.stored = layout, self._memory[: layout.stored_bytes]
        return True

    def close(self) -> None:
        """Unlock the pages; safe to call twice."""
        self._claim.close()


class FileSlab:
    """What moves of a block as it lies in its file: the pages that the system keeps of that, locked where they are.

    They are not in memory a second time, and nothing is read or cleared to have them, which is what takes long about
    a slab. `nbytes` is what the block takes in a slab, gaps between its weights included.
    Raises OSError when the file has become shorter, or cannot be mapped.
    """

    layout = None

    def __init__(self, device: Device, host_memory: HostMemory, nbytes: int, stretches: Sequence[Stretch]) -> None:
        self.nbytes = nbytes
        self._stretches = stretches
        pages = [stretch.file.pages() for stretch in stretches]
        self.size_bytes = sum(whole.nbytes for whole, _ in pages)
        self._claims = [Claim(whole, device, host_memory, Use.FILE) for whole, _ in pages]
        self.pieces: Sequence[Piece] = [
            Piece(stretch.begin, stored) for stretch, (_, stored) in zip(stretches, pages, strict=True)
        ]

    @property
    def is_locked(self) -> bool:
        """Whether all pages are locked; waits until that is done, or was refused."""
        return all([claim.is_locked for claim in self._claims])

    def read_into(self, stored: torch.Tensor) -> None:
        """Read the bytes from the file. Raises OSError when it has become shorter."""
        for begin, file in self._stretches:
            file.read_into(stored[begin : begin + file.size_bytes])

    def close(self) -> None:
        """Unlock the pages; safe to call twice."""
        for claim in self._claims:
            claim.close()
        self.pieces = ()  # not before: what is locked must not go away


def slab_on_file(device: Device, host_memory: HostMemory, nbytes: int, stretches: Sequence[Stretch]) -> FileSlab | None:
    """A `FileSlab`, or None where the file cannot be mapped. Raises OSError when it has become shorter."""
    try:
        return FileSlab(device, host_memory, nbytes, stretches)
    except OSError as error:
        if error.errno is None:
            raise
        logger.debug("the file cannot be mapped, so weights are copied: %s", error)
        return None


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
        self.slab = Slab(device, host_memory, 0, size_bytes, use=Use.BUFFER)
        self.sent: Event = device.event()


def packed_slab_bytes(stored_bytes: int) -> int:
    """What a slab for so many packed bytes takes."""
    return stored_bytes + stored_bytes // SPARE_SHARE


class HostStore:
    """The slabs of one model, by block index."""

    def __init__(self, device: Device, host_memory: HostMemory) -> None:
        self._device = device
        self.host_memory = host_memory
        self._slabs: dict[int, Slab | FileSlab] = {}
        self._begun: dict[int, Slab] = {}
        self._locking: list[Slab | FileSlab] = []
        self._warned = False
        # Not known before it was tried, since it is the file's system that may refuse.
        self._can_lock_files: bool | None = None if CAN_LOCK else False
        # Kept up to date instead of added up: they are read several times a second, by other threads, to be shown.
        self.host_bytes = 0
        self.page_locked_bytes = 0

    def __getitem__(self, index: int) -> Slab | FileSlab:
        return self._slabs[index]

    def get(self, index: int) -> Slab | FileSlab | None:
        return self._slabs.get(index)

    def has_room(self, size_bytes: int) -> bool:
        return self.host_memory.has_room(size_bytes)

    def bytes_beside(self, indices: Container[int]) -> int:
        """What the slabs of other blocks than those of `indices` take."""
        return sum(slab.size_bytes for index, slab in self._slabs.items() if index not in indices)

    def begin(self, index: int, base: int, size_bytes: int) -> bool:
        """Make what `build` will be asked for, so that its pages are there and locked by then; False if it has no room.

        It counts among what all models take, and not yet among `host_bytes`.
        """
        try:
            if index not in self._begun:
                self._begun[index] = Slab(self._device, self.host_memory, base, size_bytes)
        except HostMemoryFull:
            return False
        return True

    def build(self, index: int, base: int, size_bytes: int, layout: Layout | None = None) -> Slab:
        """Make the slab of block `index`; its old one, if any, must have been dropped."""
        assert index not in self._slabs
        begun = self._begun.pop(index, None)
        slab = begun or Slab(self._device, self.host_memory, base, size_bytes, layout)
        assert (slab.base, slab.stored.nbytes, slab.layout) == (base, size_bytes, layout)
        self._add(index, slab)
        return slab

    def build_on_file(self, index: int, nbytes: int, stretches: Sequence[Stretch]) -> FileSlab | None:
        """The same on the pages that the system keeps of the block's file, in place of the slab that it had; None where
        they cannot be locked, or lie so scattered that copies of them would be slow.

        Raises OSError when the file has become shorter, and HostMemoryFull.
        """
        size_bytes = sum(stretch.file.size_bytes for stretch in stretches)
        is_worth = size_bytes > 0 and size_bytes >= WORTH_LOCKING_BYTES * len(stretches)
        edges_bytes = 2 * mmap.PAGESIZE * len(stretches)
        if self._can_lock_files is False or not is_worth or not self.host_memory.may_lock(size_bytes, edges_bytes):
            return None
        self.drop(index)
        slab = slab_on_file(self._device, self.host_memory, nbytes, stretches)
        if slab is None:
            self._can_lock_files = False
            return None
        if self._can_lock_files is None:
            self._can_lock_files = slab.is_locked
            if not slab.is_locked:
                logger.debug("pages of files cannot be locked here, so weights are copied")
                slab.close()
                return None
        self._add(index, slab)
        return slab

    def _add(self, index: int, slab: Slab | FileSlab) -> None:
        self._slabs[index] = slab
        self._locking.append(slab)
        self.host_bytes += slab.size_bytes

    def finish(self) -> None:
        """Wait until all slabs are locked that can be, and give up what was begun in vain."""
        self._begun.clear()
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
        if isinstance(slab, Slab) and slab.pack_anew(layout):
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
        if isinstance(slab, FileSlab):
            self.host_memory.close_soon(slab)
        else:
            slab.close()

    def close(self) -> None:
        for index in list(self._slabs):
            self.drop(index)
        self.host_memory.settle()
