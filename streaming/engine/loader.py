"""Brings the weights of one block to where a plan wants them: into a slab on the host, or to the device for good.

In: a block, its form, and what its weights are to hold. Out: a `MovingBlock` for the pipeline, or residents in the
module. Slabs are kept and used again as long as they hold what is asked for. The file is long because all ways to a
form go by the same marks, which say what a slab holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress

import torch

from .block import Block, Weight, as_parameter
from .block_packer import BlockPacker
from .bounce import Bounce, Returns, Turns
from .codec import RawCodec, codec_for
from .device import Device
from .forecast import Form
from .host_memory import HostMemory
from .host_room import HostRoom
from .mapped import FileSlice
from .moving import KEPT, MovingBlock, cut_of
from .originals import Originals
from .packing import Layout
from .staging import Staged
from .store import FileSlab, HostStore, Slab, Stretch, packed_slab_bytes

logger = logging.getLogger("layerstream")

# What a weight is to hold: None for its home tensor, else the changed one, on any device.
Changed = Callable[[Weight], torch.Tensor | None]

# Where a tensor's bytes lie in a file; None for one that is not mapped from there.
FileOf = Callable[[torch.Tensor], FileSlice | None]

# Of blocks after the one that is brought, so much is looked at for what to read ahead; more than the buffers hold.
AHEAD_BYTES = 256 * 1024**2

# A block that is about to be placed: its index, form, and the mark of what it is to hold.
Coming = tuple[int, Block, Form, Hashable]

# What is reserved for packed bytes, whose number is known only afterwards, may be so much of what they take.
MOST_OF_NEED = 1.02

# Index of what lies outside the blocks, among the slabs.
OUTSIDE = -1

# The mark of a slab that is being written, which may fail midway.
PARTLY_WRITTEN = object()


class BlockLoader:
    """Fills slabs and device memory for the blocks of one model."""

    def __init__(
        self,
        device: Device,
        keep_home: Callable[[torch.Tensor], bool],
        file_of: FileOf,
        host_memory: HostMemory,
    ) -> None:
        self.store = HostStore(device, host_memory)
        self.host_room = HostRoom(self.store, keep_home)
        self.packer = BlockPacker(device)
        self.originals = Originals(device, host_memory)
        self._bounce = Bounce(device, host_memory, self.originals)
        self._turns = Turns(device, self._bounce)
        self._returns = Returns(device)
        self._device = device
        self._keep_home = keep_home
        self._file_of = file_of
        # What will pass through the device in a run, and is not there yet while loading.
        self.passing_bytes = 0
        self._marks: dict[int, Hashable] = {}
        # What of each block is read ahead, and of that what is worked on, as it was found in this load.
        self._foreseen: dict[int, tuple[list[FileSlice], list[FileSlice]]] = {}
        self._reserved: dict[int, torch.Tensor] = {}

    @property
    def changed_bytes(self) -> int:
        """Bytes of slabs that hold something else than home tensors do."""
        slabs = (self.store.get(index) for index, mark in self._marks.items() if mark is not None)
        return sum(slab.size_bytes for slab in slabs if slab is not None)

    def look_ahead(self, coming: Sequence[Coming], will_change: Callable[[Weight], bool]) -> None:
        """Begin what `place` will need of these blocks, soonest first."""
        self._read_ahead(coming, will_change)
        self._begin_slabs(coming)

    def _read_ahead(self, coming: Iterable[Coming], will_change: Callable[[Weight], bool]) -> None:
        """Begin to read what will be brought to the device.

        Nothing is begun while what comes next is not brought there: buffers would take RAM that slabs may have.
        """
        files: list[FileSlice] = []
        worked_on: list[FileSlice] = []
        ahead_bytes = 0
        for number, (index, block, form, mark) in enumerate(coming):
            if index not in self._foreseen:
                weights = self._brought(index, block, form, mark, will_change)
                changing = [w for w in weights if mark is not None and self._has_room(w, 2) and will_change(w)]
                self._foreseen[index] = self._files(weights), self._files(changing)
            found, changing_files = self._foreseen[index]
            if number == 0 and not found:
                return
            if ahead_bytes >= AHEAD_BYTES:
                break
            files += found
            worked_on += changing_files
            ahead_bytes += sum(file.size_bytes for file in found) if number else 0
        self.originals.lock(worked_on)
        self._bounce.look_ahead(file for file in files if file != self._turns.under_way)
        self._turns.look_ahead(worked_on)

    def _begin_slabs(self, coming: Iterable[Coming]) -> None:
        """Begin new slabs of blocks that cannot do without one, which so have their room in any case."""
        ahead_bytes = 0
        for number, (index, block, form, _) in enumerate(coming):
            if form is not Form.STREAMED or ahead_bytes >= AHEAD_BYTES:
                return
            if self.store.get(index) is not None or self.host_room.is_readable(index):
                continue
            cut = cut_of(block)
            if not self.store.begin(index, block.offset_of(cut), block.bytes_from(cut)):
                return
            ahead_bytes += block.bytes_from(cut) if number else 0

    def _brought(
        self, index: int, block: Block, form: Form, mark: Hashable, will_change: Callable[[Weight], bool]
    ) -> list[Weight]:
        """The weights of block `index` that pass through the device on their way to `form`, or stay there, and are in
        no slab.
        """
        kinds = (False, True) if form is Form.STREAMED_PACKED else (False,)
        slabs = [self._valid_slab(index, mark, is_packed) for is_packed in kinds]
        if any(slabs) or index in self.host_room.in_file:
            return []
        weights = block.weights[cut_of(block) :]
        if form is Form.STREAMED or (form is Form.RESIDENT and self.host_room.is_shelving):
            return [weight for weight in weights if mark is not None and will_change(weight)]
        return list(weights)

    def _files(self, weights: Iterable[Weight]) -> list[FileSlice]:
        """Where in their files the bytes are of those weights that are read from there as they are."""
        files = (self._file_of(weight.home) for weight in weights if _is_verbatim(weight))
        return [file for file in files if file is not None]

    def place(self, index: int, block: Block, form: Form, mark: Hashable, changed: Changed) -> MovingBlock | None:
        """Bring the moving weights of `block`, of which its module has the home tensors, into `form`; None if resident.

        A block that turns out not worth packing is left raw where it was to be, and one that has no room in RAM because
        others packed to more than was thought in its file. Where the device runs out of memory, what only this load
        holds there is given back first. Raises torch.OutOfMemoryError when that does not help.
        """
        try:
            return self._place(index, block, form, mark, changed)
        except torch.OutOfMemoryError:
            pass  # and with the error what it refers to
        logger.info("LayerStream: no memory on the device to load %s: trying again with more given back", block.name)
        for weight in block.weights[cut_of(block) :]:
            weight.put(weight.home)
        self._give_back()
        return self._place(index, block, form, mark, changed)

    def _place(self, index: int, block: Block, form: Form, mark: Hashable, changed: Changed) -> MovingBlock | None:
        cut = cut_of(block)
        if index in self.host_room.in_file:
            return self._leave_in_file(index, block, cut)
        if not form.is_packed:
            return self._place_raw(index, block, cut, form, mark, changed)
        slab = self._valid_slab(index, mark, is_packed=True)
        if form.is_streamed and isinstance(slab, Slab) and slab.layout is not None:
            return _restored(block, cut, slab, slab.layout, mark)
        packed = self.packer.pack(index, block, lambda raw: self._write_raw(raw, index, block, cut, mark, changed))
        if packed is None:
            return self._place_raw(index, block, cut, form, mark, changed)
        stored, layout = packed
        if not form.is_streamed:
            self.store.drop(index)
            kept_bytes = self._keep_packed(index, block.weights[cut], stored)
            return _restored(block, cut, None, layout, mark, kept_bytes)
        if not self.host_room.may_replace(index, packed_slab_bytes(layout.stored_bytes)):
            return self._leave_in_file(index, block, cut)
        slab = self.store.build_packed(index, block.offset_of(cut), layout)
        self._marks[index] = PARTLY_WRITTEN
        slab.stored.copy_(stored, non_blocking=slab.is_locked)
        self._marks[index] = mark
        return _restored(block, cut, slab, layout, mark)

    def _keep_packed(self, index: int, weight: Weight, packed: torch.Tensor) -> int:
        """Keep packed bytes on the device, carried by a home tensor of `weight` that only the module holds; give the
        bytes that they take there.
        """
        kept = self._take(index, packed.nbytes)
        kept.copy_(packed)
        own = weight.home.detach() if weight.sites[0].is_buffer else as_parameter(weight.home)
        setattr(own, KEPT, kept)
        weight.put(own)
        return kept.untyped_storage().nbytes()

    def _place_raw(
        self, index: int, block: Block, cut: int, form: Form, mark: Hashable, changed: Changed
    ) -> MovingBlock | None:
        if not form.is_streamed:
            self._keep(index, block, cut, mark, changed)
            return None
        if not self.host_room.may_replace(index, block.bytes_from(cut)):
            return self._leave_in_file(index, block, cut)
        slab = self._raw_slab(index, block, cut, mark, changed)
        for weight, tensor in self._adopt(slab, block, cut, mark):
            weight.put(tensor)
        return MovingBlock(block, cut, block.bytes_from(cut), slab, None)

    def _leave_in_file(self, index: int, block: Block, cut: int) -> MovingBlock:
        self.host_room.in_file.add(index)
        self.store.drop(index)
        base, size_bytes = block.offset_of(cut), block.bytes_from(cut)

        def read_into(stored: torch.Tensor) -> None:
            for weight in block.weights[cut:]:
                self._store(weight, None, stored[weight.offset - base :])

        return MovingBlock(block, cut, size_bytes, Staged(size_bytes, read_into, in_file=True), None)

    def _adopt(
        self, slab: Slab | FileSlab, block: Block, cut: int, mark: Hashable
    ) -> list[tuple[Weight, torch.Tensor]]:
        """Make a slab the home of the weights that it holds unchanged; give all of its weights. Those that it has in
        their file are at home as they are.
        """
        if isinstance(slab, FileSlab):
            return []
        views = block.views(slab.stored, cut, len(block.weights), slab.base)
        for weight, tensor in views:
            if mark is None and not weight.dtype_changes and not self._keep_home(weight.home):
                weight.home = tensor
        return views

    def _raw_slab(self, index: int, block: Block, cut: int, mark: Hashable, changed: Changed) -> Slab | FileSlab:
        """The slab of a block with every weight from `cut` on in it."""
        valid = self._valid_slab(index, mark)
        if valid is not None:
            return valid
        if self.host_room.is_readable(index):
            stretches = self._stretches(block, cut)
            on_file = self.store.build_on_file(index, block.bytes_from(cut), stretches)
            if on_file is not None:
                self._marks[index] = mark
                return on_file
        slab = self.store.get(index)
        if not isinstance(slab, Slab) or slab.layout is not None or self._marks[index] is None:
            # The old slab's pages outlive it for as long as home tensors lie in them.
            self.store.drop(index)
            slab = self.store.build(index, block.offset_of(cut), block.bytes_from(cut))
            if mark is not None:
                _ = slab.is_locked  # what comes from the device takes several times as long into pages that are not
        self._marks[index] = PARTLY_WRITTEN
        self._store_moving(block, cut, changed, slab.stored)
        self._marks[index] = mark
        return slab

    def _stretches(self, block: Block, cut: int) -> list[Stretch]:
        """Where in their file the weights from `cut` on lie, neighbours in one; none if any is stored otherwise."""
        base = block.offset_of(cut)
        stretches: list[Stretch] = []
        for weight in block.weights[cut:]:
            file = self._file_of(weight.home) if _is_verbatim(weight) else None
            if file is None:
                return []
            begin = weight.offset - base
            last = stretches[-1] if stretches else None
            if last is not None and last.file.is_followed_by(file, begin - last.begin):
                stretches[-1] = Stretch(last.begin, last.file.up_to(file))
            else:
                stretches.append(Stretch(begin, file))
        return stretches

    def _write_raw(
        self, raw: torch.Tensor, index: int, block: Block, cut: int, mark: Hashable, changed: Changed
    ) -> None:
        """Fill device memory with a block's bytes to be packed."""
        raw.zero_()  # the gaps between weights are packed too
        slab = self._valid_slab(index, mark)
        if slab is not None:
            for begin, stored in slab.pieces:
                raw[begin : begin + stored.nbytes].copy_(stored)
            return
        self._store_moving(block, cut, changed, raw, is_on_device=True)

    def _store_moving(
        self, block: Block, cut: int, changed: Changed, stored: torch.Tensor, *, is_on_device: bool = False
    ) -> None:
        """Write what the weights of `block` from `cut` on are to hold into `stored`, which begins where they do."""
        base = block.offset_of(cut)
        for weight in block.weights[cut:]:
            self._store(weight, changed(weight), stored[weight.offset - base :], is_on_device=is_on_device)
            weight.put(weight.home)  # a changed weight may lie on the device, where only one at a time has room

    def _valid_slab(self, index: int, mark: Hashable, is_packed: bool = False) -> Slab | FileSlab | None:
        """The slab of block `index`, if there is one of that kind with what `mark` says."""
        slab = self.store.get(index)
        is_valid = slab is not None and (slab.layout is not None) == is_packed and self._marks[index] == mark
        return slab if is_valid and (self.host_room.is_readable(index) or not self.is_on_file(index)) else None

    def is_on_file(self, index: int) -> bool:
        """Whether the slab of block `index` is pages of its file, which nobody can change in place."""
        return isinstance(self.store.get(index), FileSlab)

    def _keep(self, index: int, block: Block, cut: int, mark: Hashable, changed: Changed) -> None:
        """Put the moving weights on the device, in one piece of memory.

        Only the module holds them, so that whoever puts other tensors in their place frees the memory.
        """
        slab = self._valid_slab(index, mark)
        base, size_bytes = block.offset_of(cut), block.bytes_from(cut)
        is_shelved = self.host_room.is_shelving and size_bytes > 0
        if is_shelved and slab is None:
            is_shelved = self.host_room.may_shelve(block, size_bytes)
        if is_shelved:
            slab = self._raw_slab(index, block, cut, mark, changed)
        memory = self._take(index, size_bytes)
        if slab is not None:
            self._returns.finish()  # by which it may just be written
            # At the link's full speed, unlike homes in pages of a file, while the next block is made ready for its own.
            for begin, stored in slab.pieces:
                memory[begin : begin + stored.nbytes].copy_(stored, non_blocking=slab.is_locked)
            for weight, tensor in block.views(memory, cut, len(block.weights), base):
                weight.put(tensor)
        else:
            for weight in block.weights[cut:]:
                self._keep_weight(weight, changed(weight), memory[weight.offset - base :])
        if is_shelved and slab is not None:
            self._adopt(slab, block, cut, mark)
        else:
            self.store.drop(index)

    def keep_outside(
        self, block: Block, mark: Hashable, changed: Changed, will_change: Callable[[Weight], bool]
    ) -> None:
        """Put what lies outside the blocks on the device for good; without a copy if changed: it may have grown."""
        if mark is not None:
            self.originals.lock(self._files(weight for weight in block.weights if will_change(weight)))
        if self.host_room.is_shelving and mark is None:
            self._keep(OUTSIDE, block, 0, mark, changed)
        else:
            self.keep_first(block, len(block.weights), changed)

    def keep_first(self, block: Block, cut: int, changed: Changed) -> None:
        """Put the first `cut` weights of `block` on the device for good."""
        if cut == 0:
            return
        memory = self._device.allocate(block.offset_of(cut))
        self._bounce.look_ahead(self._files(block.weights[:cut]))
        for weight in block.weights[:cut]:
            self._keep_weight(weight, changed(weight), memory[weight.offset :])

    def _keep_weight(self, weight: Weight, changed: torch.Tensor | None, place: torch.Tensor) -> None:
        """Put on the device what `weight` is to hold: into `place`, or into memory of its own where it has grown."""
        codec = weight.codec
        if changed is not None and changed.shape != weight.home.shape:
            codec = codec_for(changed)
            place = self._device.allocate(codec.stored_bytes)
            codec.encode(changed, place)
        else:
            self._store(weight, changed, place, is_on_device=True)
        weight.put(codec.decode(place[: codec.stored_bytes]))

    def _store(
        self, weight: Weight, changed: torch.Tensor | None, stored: torch.Tensor, *, is_on_device: bool = False
    ) -> None:
        """Write what `weight` is to hold into `stored`. Raises ValueError for a changed weight of another shape."""
        if changed is not None and changed.shape != weight.home.shape:
            shapes = tuple(weight.home.shape), tuple(changed.shape)
            raise ValueError(
                f"`{weight.keys[0]}` streams as {shapes[0]}, and a LoRA makes it {shapes[1]}: "
                "set mode to off for this model, or leave that LoRA out"
            )
        source = weight.home if changed is None else changed
        piece = stored[: weight.codec.stored_bytes]
        if source.is_meta:
            piece.zero_()  # the host leaves weights that its file lacks on `meta`; they count as zeros
            return
        file = self._file_of(weight.home)
        if file is not None and changed is None and _is_verbatim(weight):
            read_into = self._bounce.bring if is_on_device else FileSlice.read_into
            if read_into(file, piece[: file.size_bytes]):
                return
        if changed is not None and not is_on_device and self._is_returned(weight, changed):
            self._returns.send(changed.detach().view(-1).view(torch.uint8), piece)
        else:
            weight.codec.encode(source, piece)
        if file is not None and (changed is None or changed.device.type == "cpu"):
            file.release()

    def _is_returned(self, weight: Weight, changed: torch.Tensor) -> bool:
        """Whether a changed weight lies on the device as it will be stored, and has room there while the next is worked
        out.
        """
        codec = weight.codec
        is_same = isinstance(codec, RawCodec) and codec == codec_for(changed) and changed.is_contiguous()
        return is_same and changed.device.type == self._device.torch_device.type and self._has_room(weight, 3)

    def home_on_device(self, weight: Weight) -> torch.Tensor | None:
        """A copy of the home tensor on the device, to work on until the next call; None where it is of a kind, or will
        be stored in a dtype, that is not brought as it is, or is larger than what has room there.
        """
        if not self._has_room(weight):
            return None
        file = self._file_of(weight.home)
        if file is not None and self._has_room(weight, 2):
            brought = self._turns.bring(file)
            if brought is not None:
                return weight.codec.decode(brought)
        place = self._device.allocate(weight.codec.stored_bytes)
        self._store(weight, None, place, is_on_device=True)
        return weight.codec.decode(place)

    def _has_room(self, weight: Weight, count: int = 1) -> bool:
        """Whether `weight` is brought to the device as it is, where `count` of its size have room."""
        is_raw = isinstance(weight.codec, RawCodec) and not weight.dtype_changes
        return is_raw and count * weight.codec.stored_bytes <= self.passing_bytes

    def keep_originals(self, patched: Iterable[Block], will_change: Callable[[Weight], bool]) -> None:
        """Have no originals locked but those of the weights in `patched` blocks that will be worked on again."""
        weights = (weight for block in patched for weight in block.weights if will_change(weight))
        self.originals.keep_only(set(self._files(weights)))

    def reserve(self, sizes: Mapping[int, int]) -> None:
        """Take the device memory of blocks that will stay there, bytes by their index; no hole among them stays from
        what was worked on before or will be. What the device refuses is asked for again in its turn.
        """
        self._give_back()
        with suppress(torch.OutOfMemoryError):
            for index, size_bytes in sizes.items():
                self._reserved[index] = self._device.allocate(size_bytes)

    def _give_back(self) -> None:
        """Give back what only working on weights takes of the device; whoever works on more takes it again."""
        self._returns.finish()
        self._turns.finish()
        self.packer.finish()
        self._device.trim()

    def _take(self, index: int, size_bytes: int) -> torch.Tensor:
        """Device memory for what stays of block `index`: what was reserved for it, unless that suits it badly."""
        reserved = self._reserved.pop(index, None)
        if reserved is not None and size_bytes <= reserved.nbytes <= MOST_OF_NEED * size_bytes:
            return reserved[:size_bytes]
        del reserved
        return self._device.allocate(size_bytes)

    def finish(self) -> None:
        """End a load: give back what packing takes of the device, and what was reserved and not used."""
        self.store.finish()
        self.originals.finish()
        self.packer.finish()
        self._bounce.finish()
        self._turns.finish()
        self._returns.finish()
        self._foreseen.clear()
        self._reserved.clear()
        self.store.host_memory.settle()  # what is unlocked in the midst of a run holds up what the device is asked for

    def close(self) -> None:
        self.finish()
        self.originals.give_up()
        self.store.close()
        self._marks.clear()


def _is_verbatim(weight: Weight) -> bool:
    """Whether what is stored of the home tensor is its own bytes."""
    return weight.codec.is_verbatim and not weight.dtype_changes


def _restored(
    block: Block, cut: int, slab: Slab | None, layout: Layout, mark: Hashable, kept_bytes: int = 0
) -> MovingBlock:
    """A block that is restored from packed bytes in `slab`, or from those that it keeps on the device."""
    differs = mark is not None
    return MovingBlock(block, cut, block.bytes_from(cut), slab, layout, differs=differs, kept_bytes=kept_bytes)
