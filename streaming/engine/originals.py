"""Weights that are worked on whenever patches change, locked in the pages that the system keeps of their file: copied
from there at the link's full speed, with nothing read.

In: where they lie. Out: their bytes. Their pages are in memory anyway for as long as nobody else asks for it, so they
are locked only where much is free, and make way for any slab.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch

from .device import Device
from .host_memory import GIB, HostMemory
from .mapped import CAN_LOCK, FileSlice
from .store import FileSlab, Stretch, slab_on_file

# So much of what may be locked and taken is left, to slabs and to what else needs RAM.
LEFT_BYTES = 8 * GIB

# What is smaller is read as fast.
WORTH_BYTES = 4 * 1024**2


class _Key(NamedTuple):
    """What tells bytes of files apart: the same number and address may be another file's by now."""

    file: FileSlice
    device: int
    inode: int
    changed_ns: int


class Originals:
    """Those of one model."""

    def __init__(self, device: Device, host_memory: HostMemory) -> None:
        self._device = device
        self._host_memory = host_memory
        self._slabs: dict[_Key, FileSlab] = {}
        self.can_lock = CAN_LOCK
        """False where no pages of files can be locked, as far as it was tried."""
        self.size_bytes = 0
        host_memory.spares.add(self)

    def __contains__(self, file: FileSlice) -> bool:
        return bool(self._slabs) and _key(file) in self._slabs

    def lock(self, files: Iterable[FileSlice]) -> None:
        """Begin to lock those, soonest needed first, as far as there is room.

        Raises OSError when a file has become shorter.
        """
        new = [file for file in dict.fromkeys(files) if file.size_bytes >= WORTH_BYTES and file not in self]
        # The system is asked for its free RAM each time, so for all of them at once where that does.
        may_all = self._may_lock(sum(file.size_bytes for file in new))
        for file in new:
            if not (may_all or self._may_lock(file.size_bytes)):
                return
            slab = slab_on_file(self._device, self._host_memory, file.size_bytes, [Stretch(0, file)])
            if slab is None:
                self.can_lock = False
                return
            self._slabs[_key(file)] = slab
            self.size_bytes += slab.size_bytes

    def _may_lock(self, size_bytes: int) -> bool:
        return size_bytes > 0 and self.can_lock and self._host_memory.may_lock(size_bytes, LEFT_BYTES)

    def relieve(self) -> None:
        """Give up all where so little is free that they would not be locked now."""
        if self._slabs and not self._host_memory.may_lock(0, LEFT_BYTES):
            self.give_up()

    def bytes_of(self, file: FileSlice) -> torch.Tensor | None:
        """The bytes in locked pages, uint8 [size_bytes]; None where they are not."""
        slab = self._slabs.get(_key(file)) if self._slabs else None
        if slab is None:
            return None
        if slab.is_locked:
            return slab.pieces[0].stored
        self.can_lock = False
        self.give_up()
        return None

    def keep_only(self, files: Collection[FileSlice]) -> None:
        """Have all others given up soon."""
        if not self._slabs:
            return
        for key in self._slabs.keys() - set(map(_key, files)):
            slab = self._slabs.pop(key)
            self.size_bytes -= slab.size_bytes
            self._host_memory.close_soon(slab)

    def give_up(self) -> None:
        """Give up all; copies under way are waited for."""
        self.keep_only(())
        self._host_memory.settle()

    def finish(self) -> None:
        """Wait until all are locked that can be."""
        for slab in self._slabs.values():
            if not slab.is_locked:
                self.can_lock = False
        if not self.can_lock:
            self.give_up()


def _key(file: FileSlice) -> _Key:
    found = os.fstat(file.descriptor)
    return _Key(file, found.st_dev, found.st_ino, found.st_mtime_ns)
