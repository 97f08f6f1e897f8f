"""Which blocks have slabs and which stay in their file, where host memory has no room for all.

In: what a plan has stream, and the bounds of host memory. Out: the blocks that are read from their file whenever they
run. Only what is mapped from there can be; anything else has its slab whatever it takes. Nothing is read or written
here; slabs that are in the way are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .block import Block
from .moving import is_block_mapped
from .staging import choose_left
from .store import HostStore


class HostRoom:
    """What of host memory the blocks of one model may take, besides what they cannot do without."""

    def __init__(self, store: HostStore, is_mapped: Callable[[torch.Tensor], bool]) -> None:
        self.is_shelving = False
        """Whether what stays on the device keeps a page-locked copy on the host, to leave and return at link speed."""
        self.in_file: set[int] = set()
        """The blocks that get no slab: they are read from their file whenever they run."""
        self._readable: set[int] = set()
        self._store = store
        self._is_mapped = is_mapped

    def choose_in_file(self, sizes: Mapping[int, int], unchanged: Mapping[int, Block]) -> None:
        """Choose which of the blocks whose slabs would have `sizes`, in the order they run, get none for want of host
        memory.

        Only of the `unchanged` ones: their weights can be read again at any time, where they are mapped. Slabs of such
        ones that need none are dropped at once where there is no room for them beside the new ones.
        """
        store = self._store
        self._readable = {index for index, block in unchanged.items() if is_block_mapped(block, self._is_mapped)}
        readable = {index: size_bytes for index, size_bytes in sizes.items() if index in self._readable}
        others_bytes = sum(sizes.values()) - sum(readable.values())
        if self.is_shelving:
            others_bytes += store.bytes_beside(self._readable | sizes.keys())
        room_bytes = store.host_memory.room_for_copies() + store.host_bytes - others_bytes
        self.in_file = choose_left(readable, room_bytes, self.in_file)
        spare_bytes = 0 if self.in_file else room_bytes - sum(readable.values())
        for index in self.in_file | (self._readable - sizes.keys()):
            slab = store.get(index)
            if slab is not None:
                spare_bytes -= slab.size_bytes
                if spare_bytes < 0:
                    store.drop(index)

    def is_readable(self, index: int) -> bool:
        """Whether what block `index` holds is what its file does, and stays so while it has a slab."""
        return index in self._readable

    def may_replace(self, index: int, size_bytes: int) -> bool:
        """Whether a slab of `size_bytes` may take the place of the one of block `index`; where it must, it may."""
        old = self._store.get(index)
        more_bytes = size_bytes - (old.size_bytes if old is not None else 0)
        return more_bytes <= 0 or index not in self._readable or more_bytes <= self._store.host_memory.room_for_copies()

    def may_shelve(self, block: Block, size_bytes: int) -> bool:
        """Whether there is room for a copy of resident `block` beside what streams."""
        if not is_block_mapped(block, self._is_mapped):
            return self._store.has_room(size_bytes)
        return not self.in_file and self._store.host_memory.room_for_copies() >= size_bytes
