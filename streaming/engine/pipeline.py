"""The runner: fetch, wait, bind, free. It owns the copy stream and decides what is copied when.

In: blocks with their slabs, a ring, a walk. Out: for the time of a block's forward its module holds device tensors, at
all other times host tensors.

Ordering, which is all there is to get right:
1. a copy into a slot waits for the `free` event of the visit before, so it never overwrites what compute still reads;
2. a block's compute waits for the `ready` event of its own visit, so it never reads what has not arrived;
3. every copy is on one stream, so two copies into one slot keep their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .block import Block, Weight, ready_to_put
from .device import Device
from .meter import Meter
from .ring import Ring, Slot
from .walk import Walk


class StreamedBlock(NamedTuple):
    """A block whose weights from `cut` on are streamed; `source` is their bytes on the host."""

    block: Block
    cut: int
    source: torch.Tensor
    host_tensors: list[tuple[Weight, torch.Tensor]]


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
        self._views: dict[tuple[int, int], list[tuple[Weight, torch.Tensor]]] = {}
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
        for slot in self._ring.slots:
            if slot.is_bound:
                self._free(slot)
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
            slot = self._ring.find(index)
            if slot is not None and slot.is_bound:
                self._free(slot)
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
        for weight, tensor in self._slot_views(index, slot):
            weight.put(tensor)
        self._refill()

    def _free(self, slot: Slot) -> None:
        index, visit = slot.holder, slot.visit
        assert index is not None and visit is not None
        for weight, tensor in self._blocks[index].host_tensors:
            weight.put(tensor)
        visit.free.record(self._device.compute_stream())
        self._device.note_read(slot.memory)
        visit.was_used = True
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

    def _slot_views(self, index: int, slot: Slot) -> list[tuple[Weight, torch.Tensor]]:
        """The block's weights as tensors over the slot; made once for each pair, since making them costs time."""
        views = self._views.get((index, slot.number))
        if views is None:
            streamed = self._blocks[index]
            views = ready_to_put(
                streamed.block.views(
                    slot.memory, streamed.cut, len(streamed.block.weights), streamed.block.offset_of(streamed.cut)
                )
            )
            self._views[index, slot.number] = views
        return views

