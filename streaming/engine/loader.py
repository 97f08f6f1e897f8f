"""Brings the weights of one block to where a plan wants them: into a slab on the host, or to the device for good.

In: a block, a cut, and what its weights are to hold. Out: a `StreamedBlock` for the pipeline, residents in the module.
Slabs are kept and used again as long as they hold what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from .block import Block, Weight, ready_to_put
from .codec import RawCodec
from .device import Device
from .packing import Layout, worst_bytes
from .store import HostStore, Slab

# What a weight is to hold: None for its home tensor, else the changed one, on any device.
Changed = Callable[[Weight], torch.Tensor | None]

# A packed block larger than this share of its raw bytes travels raw: restoring it would cost more than it saves.
WORTH_PACKING = 0.8


class StreamedBlock(NamedTuple):
    """A block whose weights from `cut` on are streamed.

    `source` is what crosses the link, packed if there is a `layout`; `raw_bytes` is what it is on the device.
    `host_tensors` stand in the module's tables while the block does not run.
    """

    block: Block
    cut: int
    source: torch.Tensor
    layout: Layout | None
    raw_bytes: int
    host_tensors: list[tuple[Weight, torch.Tensor]]


class BlockLoader:
    """Fills slabs and resident memory for the blocks of one model."""

    def __init__(self, device: Device, keep_home: Callable[[torch.Tensor], bool]) -> None:
        self.store = HostStore(device)
        self._device = device
        self._keep_home = keep_home
        self._marks: dict[int, Hashable] = {}
        self._raw: torch.Tensor | None = None
        self._room: torch.Tensor | None = None

    def stream(
        self, index: int, block: Block, cut: int, mark: Hashable, changed: Changed, is_packed: bool
    ) -> StreamedBlock:
        """Have the weights of `block` from `cut` on in a slab, and its host tensors in the module."""
        base = block.offset_of(cut)
        raw_bytes = block.weight_bytes() - base
        if is_packed and mark is None and _is_bf16(block, cut):
            slab = self._packed_slab(index, block, cut)
            if slab is not None:
                host_tensors = ready_to_put([(weight, weight.home) for weight in block.weights[cut:]])
                return _placed(StreamedBlock(block, cut, slab.stored, slab.layout, raw_bytes, host_tensors))
        slab = self._raw_slab(index, block, cut, mark, changed)
        views = block.views(slab.stored, cut, len(block.weights), slab.base)
        for weight, tensor in views:
            if mark is None and not weight.dtype_changes and not self._keep_home(weight.home):
                weight.home = tensor
        source = slab.stored[base - slab.base :]
        return _placed(StreamedBlock(block, cut, source, None, raw_bytes, ready_to_put(views)))

    def _raw_slab(self, index: int, block: Block, cut: int, mark: Hashable, changed: Changed) -> Slab:
        """The slab of a block with every weight from `cut` on in it; one that holds more will do."""
        base = block.offset_of(cut)
        slab = self.store.get(index)
        if slab is not None and slab.layout is None and slab.base <= base and self._marks[index] == mark:
            return slab
        # The old slab's pages outlive it for as long as home tensors lie in them.
        self.store.drop(index)
        slab = self.store.build(index, base, block.weight_bytes() - base)
        self._marks[index] = mark
        for weight in block.weights[cut:]:
            _store(weight, changed(weight), slab.stored[weight.offset - base :])
            weight.put(weight.home)  # a changed weight may lie on the device, where only one at a time has room
        return slab

    def _packed_slab(self, index: int, block: Block, cut: int) -> Slab | None:
        """The same in packed form, packed on the device; None where that does not pay."""
        packer = self._device.packer
        assert packer is not None
        base = block.offset_of(cut)
        slab = self.store.get(index)
        if slab is not None and slab.layout is not None and slab.base == base:
            return slab
        raw, room = self._workspace(block.weight_bytes() - base)
        raw.zero_()  # the gaps between weights are packed too
        for weight in block.weights[cut:]:
            _store(weight, None, raw[weight.offset - base :])
        layout = packer.encode(raw, room)
        if layout.stored_bytes > WORTH_PACKING * raw.numel():
            return None
        self.store.drop(index)
        slab = self.store.build(index, base, layout.stored_bytes, layout)
        slab.stored.copy_(room[: layout.stored_bytes])
        self._marks[index] = None
        return slab

    def _workspace(self, size_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Device memory for packing, one piece for all blocks of a load, so that it leaves no holes among residents."""
        if self._raw is None or self._room is None or self._raw.numel() < size_bytes:
            self._raw = self._room = None
            self._raw = self._device.allocate(size_bytes)
            self._room = self._device.allocate(worst_bytes(size_bytes // 2))
        return self._raw[:size_bytes], self._room

    def finish(self) -> None:
        """End a load: give the workspace back."""
        self._raw = self._room = None

    def keep(self, block: Block, cut: int, changed: Changed) -> None:
        """Put the first `cut` weights of `block` on the device, in one piece of memory.

        Only the module holds them, so that whoever puts other tensors in their place frees the memory.
        """
        if cut == 0:
            return
        memory = self._device.allocate(block.offset_of(cut))
        for weight, tensor in block.views(memory, 0, cut, 0):
            _store(weight, changed(weight), memory[weight.offset :])
            weight.put(tensor)

    def close(self) -> None:
        self.finish()
        self.store.close()
        self._marks.clear()


def _is_bf16(block: Block, cut: int) -> bool:
    codecs = [weight.codec for weight in block.weights[cut:]]
    return all(isinstance(codec, RawCodec) and codec.dtype is torch.bfloat16 for codec in codecs)


def _placed(streamed: StreamedBlock) -> StreamedBlock:
    for weight, tensor in streamed.host_tensors:
        weight.put(tensor)
    return streamed


def _store(weight: Weight, changed: torch.Tensor | None, stored: torch.Tensor) -> None:
    source = weight.home if changed is None else changed
    piece = stored[: weight.codec.stored_bytes]
    if source.is_meta:
        piece.zero_()  # the host leaves weights that its file lacks on `meta`; they count as zeros
    else:
        weight.codec.encode(source, piece)
