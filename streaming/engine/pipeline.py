"""The runner: fetch, wait, bind, free. It owns the copy stream and decides what is copied when.

In: blocks with their slabs, a ring, a walk. Out: for the time of a block's forward its module holds device tensors, at
all other times host tensors.

Ordering, which is all there is to get right:
1. a copy into a slot waits for the `free` event of the visit before, so it never overwrites what compute still reads;
2. a block's compute waits for the `ready` event of its own visit, so it never reads what has not arrived;
3. every copy is on one stream, so two copies into one slot keep their order;
4. a packed block is restored on the stream that computes, after the block before it, so one scratch serves all.
"""

from __future__ import annotations

import torch

from .block import Weight, ready_to_put
from .device import Device
from .loader import StreamedBlock
from .meter import Meter, Visit
from .ring import Ring, Slot
from .walk import Walk

SCRATCH = -1  # where a slot's number would be, for views over the scratch


class Pipeline:
    """Streams blocks through a ring. Every method is called by the thread that runs the model."""

    def __init__(
        self, device: Device, blocks: dict[int, StreamedBlock], ring: Ring, walk: Walk, prefetch: int, meter: Meter
    ) -> None:
        self._device = device
        self._blocks = blocks
        self._ring = ring
        self._walk = walk
        self._prefetch = prefetch
        self._meter = meter
        # Copies get a stream of their own, so that they run beside compute instead of between its kernels.
        self._copies = device.copy_stream()
        # A fresh ring may lie where compute still reads what was there before: torch orders its own stream only.
        begun = device.event()
        begun.record(device.compute_stream())
        self._copies.wait_event(begun)
        self._views: dict[tuple[int, int], list[tuple[Weight, torch.Tensor]]] = {}
        # Blocks whose forward runs, with their visit; a restored one has left its slot.
        self._bound: dict[int, tuple[Visit, Slot | None]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin_pass(self) -> None:
        """Bracket every streamed block's forward and fetch the first blocks."""
        self._walk.begin()
        for index, streamed in self._blocks.items():
            module = streamed.block.module
            self._hooks.append(module.register_forward_pre_hook(self._before(index), prepend=True))
            self._hooks.append(module.register_forward_hook(self._after(index)))
        self._refill()

    def end_pass(self, whole: bool) -> None:
        """Remove the brackets; after a pass that broke off, free what it left bound."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for index in list(self._bound):
            self._unbind(index)
        if whole:
            self._walk.finish()
        else:
            self._walk.abandon()
        self._meter.finish_pass(whole)

    def discard(self) -> None:
        """Forget everything fetched ahead, after waiting for copies under way: host bytes are about to change."""
        self._copies.synchronize()
        for slot in self._ring.slots:
            if slot.holder is not None and not slot.is_bound:
                self._ring.empty(slot)

    def close(self) -> None:
        """Wait for copies under way, so that slabs and slots may go."""
        self._copies.synchronize()
        self._views.clear()

    def _before(self, index: int):
        def arrive(module: torch.nn.Module, args: tuple) -> None:
            self._arrive(index)

        return arrive

    def _after(self, index: int):
        def leave(module: torch.nn.Module, args: tuple, output: object) -> None:
            if index in self._bound:
                self._unbind(index)
                self._refill()

        return leave

    def _arrive(self, index: int) -> None:
        counts = self._meter.current
        counts.departures += self._walk.arrive(index)
        slot = self._ring.find(index)
        if slot is None:
            counts.misses += 1
            slot = self._ring.take(keep=())
            if slot is None:
                name = self._blocks[index].block.name
                raise RuntimeError(f"`{name}` started inside {len(self._ring)} other blocks: raise prefetch_blocks")
            self._fetch(index, slot)
        else:
            counts.hits += 1
        visit = slot.visit
        assert visit is not None
        compute = self._device.compute_stream()
        visit.asked.record(compute)
        compute.wait_event(visit.ready)
        visit.running.record(compute)
        slot.is_bound = True
        streamed = self._blocks[index]
        if streamed.layout is None:
            self._bound[index] = visit, slot
            views = self._views_of(streamed, index, slot.number, slot.memory)
        else:
            self._restore(streamed, slot)
            self._bound[index] = visit, None
            views = self._views_of(streamed, index, SCRATCH, self._ring.scratch)
        visit.restored.record(compute)
        for weight, tensor in views:
            weight.put(tensor)
        self._refill()

    def _restore(self, streamed: StreamedBlock, slot: Slot) -> None:
        """Restore a packed block into the scratch; its slot is free from then on, before the block computes."""
        assert streamed.layout is not None and self._device.packer is not None
        if any(slot is None for _, slot in self._bound.values()):
            raise RuntimeError(f"`{streamed.block.name}` started inside another packed block")
        self._device.packer.decode(slot.memory[: streamed.source.nbytes], streamed.layout, self._ring.scratch)
        self._free(slot)

    def _unbind(self, index: int) -> None:
        visit, slot = self._bound.pop(index)
        visit.done.record(self._device.compute_stream())
        visit.was_used = True
        for weight, tensor in self._blocks[index].host_tensors:
            weight.put(tensor)
        if slot is not None:
            self._free(slot)
        else:
            self._device.discard(self._ring.scratch)

    def _free(self, slot: Slot) -> None:
        index, visit = slot.holder, slot.visit
        assert index is not None and visit is not None
        visit.free.record(self._device.compute_stream())
        self._device.note_read(slot.memory)
        slot.is_bound = False
        # A block that comes again before its slot is needed stays: walks shorter than the ring, repeated blocks.
        if index not in self._walk.upcoming(len(self._ring)):
            self._ring.empty(slot)

    def _refill(self) -> None:
        """Start copies for the blocks ahead, as far as slots allow, soonest first."""
        ahead = self._walk.upcoming(self._prefetch)
        for index in ahead:
            if self._ring.find(index) is None:
                slot = self._ring.take(keep=ahead)
                if slot is None:
                    return
                self._fetch(index, slot)

    def _fetch(self, index: int, slot: Slot) -> None:
        if slot.holder is not None:
            self._ring.empty(slot)
        source = self._blocks[index].source
        visit = self._meter.visit(index)
        if slot.visit is not None:
            self._copies.wait_event(slot.visit.free)  # rule 1
        visit.fetching.record(self._copies)
        self._device.copy(slot.memory[: source.nbytes], source, self._copies)
        visit.ready.record(self._copies)
        slot.holder, slot.visit = index, visit
        self._meter.current.moved_bytes += source.nbytes

    def _views_of(
        self, streamed: StreamedBlock, index: int, place: int, memory: torch.Tensor
    ) -> list[tuple[Weight, torch.Tensor]]:
        """The block's weights as tensors over `memory`; made once for each place, since making them costs time."""
        views = self._views.get((index, place))
        if views is None:
            block, cut = streamed.block, streamed.cut
            views = ready_to_put(block.views(memory, cut, len(block.weights), block.offset_of(cut)))
            self._views[index, place] = views
        return views
