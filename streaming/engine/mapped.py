"""Weights that lie in a file and are mapped from there: read past the mapping, and its pages given back.

In: where in an open file a tensor's bytes are. Out: those bytes in a slab. A page that is read through a mapping counts
as this process's memory beside the slab that it was copied to, for as long as the file is mapped; what is read from the
file is the system's to keep or drop. It is told to do neither: a plan made anew may want the weight again.
"""

from __future__ import annotations

import mmap
import os
import sys
from concurrent.futures import Future, wait
from typing import NamedTuple

import torch

from .pages import file_pages, give_back_mapped, threads

PIECE_BYTES = 8 * 1024**2

# Windows has no such call.
CAN_READ = hasattr(os, "preadv")

CAN_LOCK = sys.platform == "linux"
"""Whether pages of files are locked where the system keeps them, if the device can do that too."""


class Reading(NamedTuple):
    """Reads that other threads do."""

    parts: list[Future[None]]

    def stop(self) -> None:
        """Have nothing written any more."""
        for part in self.parts:
            part.cancel()
        wait(self.parts)

    def finish(self) -> None:
        """Wait for the bytes. Raises what reading raised, and then nothing is written any more either."""
        wait(self.parts)
        for part in self.parts:
            part.result()


class FileSlice(NamedTuple):
    """Bytes of an open file, and the address that they are mapped at."""

    descriptor: int
    offset: int
    size_bytes: int
    address: int

    def read_into(self, stored: torch.Tensor) -> bool:
        """Fill uint8 host memory [size_bytes] with the bytes; False where this system cannot.

        Raises OSError when the file has become shorter, where reading the mapping would end the process.
        """
        if not CAN_READ:
            return False
        if stored.numel() <= PIECE_BYTES:
            self._read(0, stored)
        else:
            self.begin_reading(stored, 0).finish()
        return True

    def begin_reading(self, stored: torch.Tensor, begin: int) -> Reading:
        """Start to fill uint8 host memory with the bytes from `begin` on. Only where the system can read so."""
        assert begin + stored.numel() <= self.size_bytes
        starts = range(begin, begin + stored.numel(), PIECE_BYTES)
        pieces = zip(starts, stored.split(PIECE_BYTES), strict=True)
        return Reading([threads.submit(self._read, start, piece) for start, piece in pieces])

    def _read(self, begin: int, stored: torch.Tensor) -> None:
        left, position = stored.numpy().data, self.offset + begin
        while left:
            count = os.preadv(self.descriptor, [left], position)
            if count == 0:
                raise _became_shorter(position, len(left))
            left, position = left[count:], position + count

    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The system's own pages with the bytes, whole ones, mapped anew to be read, and of them uint8 [size_bytes] the
        bytes. Nothing may read there before the pages are locked: reading past the end of a file ends the process.

        Raises OSError when the file has become shorter, or cannot be mapped.
        """
        file_bytes = os.fstat(self.descriptor).st_size
        if file_bytes < self.offset + self.size_bytes:
            raise _became_shorter(file_bytes, self.offset + self.size_bytes - file_bytes)
        begin = self.offset % mmap.PAGESIZE
        pages = file_pages(self.descriptor, self.offset - begin, begin + self.size_bytes)
        return pages, pages[begin : begin + self.size_bytes]

    def whole(self) -> FileSlice:
        """The whole file."""
        return FileSlice(self.descriptor, 0, os.fstat(self.descriptor).st_size, self.address - self.offset)

    def is_followed_by(self, other: FileSlice, distance: int) -> bool:
        """Whether `other` begins `distance` bytes after these do, in the same file."""
        is_same = (self.descriptor, self.address - self.offset) == (other.descriptor, other.address - other.offset)
        return is_same and self.offset + distance == other.offset

    def up_to(self, last: FileSlice) -> FileSlice:
        """These bytes and all to the end of `last`, in one."""
        return self._replace(size_bytes=last.offset + last.size_bytes - self.offset)

    def release(self) -> None:
        """Have the mapping's pages no longer count as this process's; whoever reads there again gets them anew."""
        first = -(-self.address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self.address + self.size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            give_back_mapped(first, end - first)


def _became_shorter(end: int, missing_bytes: int) -> OSError:
    return OSError(
        f"the file of a weight ends at byte {end} and {missing_bytes} more are needed: it was changed while it was "
        "open, so load the model again"
    )
