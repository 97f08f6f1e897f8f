"""Packs what moves of blocks, and knows what each packed to.

In: blocks, and who writes their bytes to where they are packed. Out: packed bytes on the device, if packing pays. Where
those go is the loader's business.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .block import Block
from .device import Device
from .moving import cut_of, packable_dtype
from .packing import Layout, worst_bytes

# A packed block larger than this share of its raw bytes is left as it is: restoring it would cost more than it saves.
WORTH_PACKING = 0.93


class BlockPacker:
    """Packs the blocks of one model, in device memory that it holds from the first of a load to the last."""

    def __init__(self, device: Device) -> None:
        self.packed_bytes: dict[int, int] = {}
        """What blocks packed to, by index; as many bytes as they have where packing them does not pay."""
        self._device = device
        self._raw: torch.Tensor | None = None
        self._room: torch.Tensor | None = None

    def pack(
        self, index: int, block: Block, write_raw: Callable[[torch.Tensor], None]
    ) -> tuple[torch.Tensor, Layout] | None:
        """Pack what moves of `block`, all of whose bytes `write_raw` writes, gaps between weights included.

        Gives the bytes, in memory of the next call; None if it is no gain.
        """
        packer, dtype = self._device.packer, packable_dtype(block)
        assert packer is not None and dtype is not None
        size_bytes = block.bytes_from(cut_of(block))
        if self.packed_bytes.get(index) == size_bytes:
            return None
        raw, room = self._workspace(size_bytes, dtype)
        write_raw(raw)
        layout = packer.encode(raw, room, dtype)
        is_gain = layout.stored_bytes <= WORTH_PACKING * size_bytes
        self.packed_bytes[index] = layout.stored_bytes if is_gain else size_bytes
        return (room[: layout.stored_bytes], layout) if is_gain else None

    def _workspace(self, size_bytes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Device memory for packing, one piece for all blocks of a load, so that it leaves no holes among residents."""
        room_bytes = worst_bytes(size_bytes // dtype.itemsize, dtype)
        if self._raw is None or self._raw.numel() < size_bytes:
            self._raw = None
            self._raw = self._device.allocate(size_bytes)
        if self._room is None or self._room.numel() < room_bytes:
            self._room = None
            self._room = self._device.allocate(room_bytes)
        return self._raw[:size_bytes], self._room

    def finish(self) -> None:
        """End a load: give the workspace back."""
        self._raw = self._room = None
