"""The runner: fetch, wait, bind, free. It owns the copy stream and decides what is copied when.

In: blocks with their host bytes, a ring, a walk. Out: for the time of a block's forward its module holds device
tensors, at all other times host tensors.

Ordering, which is all there is to get right:
1. a copy into a place waits for the `free` event of what lay there, so it never overwrites what compute still reads;
2. a block's compute waits for the `ready` event of its own place, so it never reads what has not arrived;
3. every copy is on one stream, so copies into the same bytes keep their order;
4. a packed block is restored on the stream that computes, after the block before it, so one scratch serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .block import Block, Weight, ready_to_put
from .device import Device
from .loader import MovingBlock
from .meter import Meter, Visit
from .ring import Place, Ring
from .walk import Walk

Bound = tuple[Place | None, Visit | None, list[tuple[Weight, torch.Tensor]]]

NoteBound = Callable[[Block, bool], None]
"""Told that the weights of a block came to the device (True), or went back to the host."""


class Pipeline:
    """Brings blocks to the device in time. Every method is called by the thread that runs the model.

    `moving` are the blocks that are streamed or restored, by their index in `blocks`; the others are only timed.
    """

    def __init__(
        self,
        device: Device,
        blocks: Sequence[Block],
        moving: dict[int, MovingBlock],
        ring: Ring,
        walk: Walk,
        meter: Meter,
        note_bound: NoteBound,
    ) -> None:
        self._device = device
        self._blocks = blocks
        self._moving = moving
        self._ring = ring
        self._walk = walk
        self._meter = meter
        self._note_bound = note_bound
        # Copies get a stream of their own, so that they run beside compute instead of between its kernels.
        self._copies = device.copy_stream()
        self._views: dict[int, list[tuple[Weight, torch.Tensor]]] = {}
        self._bound: dict[int, Bound] = {}
        self._is_scratch_taken = False
        self._visits: dict[int, Visit] = {}
        self._compute = device.compute_stream()
        # Brackets stay for the run, since making them costs time in each pass, and do nothing between passes.
        self._is_in_pass = False
        self._brackets: list[torch.utils.hooks.RemovableHandle] = []
        for index in moving:
            self._brackets += self._bracket(index, self._arrive, self._leave)
        self._timers: list[torch.utils.hooks.RemovableHandle] = []
        self._settle()  # a fresh ring may lie where compute still reads what was there before

    def _bracket(
        self, index: int, before: Callable[[int], None], after: Callable[[int], None]
    ) -> list[torch.utils.hooks.RemovableHandle]:
        def enter(module: torch.nn.Module, args: tuple) -> None:
            if self._is_in_pass:
                before(index)

        def leave(module: torch.nn.Module, args: tuple, output: object) -> None:
            if self._is_in_pass:
                after(index)

        module = self._blocks[index].module
        return [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]

    def _settle(self) -> None:
        """Order copies after everything the device was given to compute: no place knows who reads its bytes."""
        given = self._device.event()
        given.record(self._compute)
        self._copies.wait_event(given)

    # -- a pass --------------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Fetch the first blocks; from now on blocks that run are served."""
        self._compute = self._device.compute_stream()
        self._meter.begin_pass(self._compute)
        self._walk.begin()
        if self._meter.is_timing:
            for index in range(len(self._blocks)):
                if index not in self._moving:
                    self._timers += self._bracket(index, self._begin_visit, self._end_visit)
        self._is_in_pass = True
        self._refill()

    def end_pass(self, whole: bool) -> None:
        """Serve no more; after a pass that broke off, free what it left bound."""
        self._is_in_pass = False
        for timer in self._timers:
            timer.remove()
        self._timers.clear()
        self._visits.clear()
        for index in list(self._bound):
            self._unbind(index)
        if not whole:
            self._walk.abandon()
        elif self._walk.finish():
            self._ring.arrange(self._walk.order)
            self._views.clear()
            self._settle()
        self._meter.finish_pass(whole)

    def discard(self) -> None:
        """Forget everything fetched ahead, after waiting for copies under way: host bytes are about to change."""
        self._copies.synchronize()
        self._ring.empty()
        self._settle()

    def close(self) -> None:
        """Remove the brackets and wait for copies under way, so that slabs and ring may go."""
        for bracket in self._brackets:
            bracket.remove()
        self._brackets.clear()
        self._meter.close_trace(self._device.compute_stream())
        self._copies.synchronize()
        self._meter.collect(wait=True)
        self._views.clear()

    # -- a block -------------------------------------------------------------------------------------------------

    def _arrive(self, index: int) -> None:
        moving = self._moving[index]
        place = None if moving.source is None else self._called_for(index)
        if (moving.source is not None and place is None) or (moving.layout is not None and self._is_scratch_taken):
            self._meter.current.unplaced += 1
            return  # it runs inside another one; its host tensors are in its module, and the host casts those
        visit = self._meter.visit(index, moving.raw_bytes if moving.layout else 0)
        if visit is not None:
            visit.asked.record(self._compute)
        if place is not None:
            self._compute.wait_event(place.ready)
            place.is_bound = True
        if visit is not None:
            visit.running.record(self._compute)
        packed = moving.kept() if place is None else place.memory
        if moving.layout is not None:
            assert self._device.packer is not None
            self._device.packer.decode(packed, moving.layout, self._ring.scratch)
            self._is_scratch_taken = True
        if visit is not None:
            visit.restored.record(self._compute)
        before = []
        for weight, tensor in self._views_of(index, packed if moving.layout is None else self._ring.scratch):
            before.append((weight, weight.current()))
            weight.put(tensor)
        self._bound[index] = (place if moving.layout is None else None), visit, before
        self._note_bound(moving.block, True)
        if moving.layout is not None and place is not None:
            self._free(place)
            self._refill()

    def _called_for(self, index: int) -> Place | None:
        """The place of a streamed block that starts now, fetched late if need be; None if its bytes are taken."""
        counts = self._meter.current
        counts.departures += self._walk.arrive(index)
        place = self._ring.places[index]
        if place.is_held:
            counts.hits += 1
            return place
        counts.misses += 1
        if not self._ring.can_give(index, soon=()):
            return None
        self._fetch(index)
        return place

    def _leave(self, index: int) -> None:
        if index in self._bound:
            self._unbind(index)
            if self._moving[index].layout is None:
                self._refill()

    def _unbind(self, index: int) -> None:
        place, visit, before = self._bound.pop(index)
        if visit is not None:
            visit.done.record(self._compute)
        for weight, tensor in before:
            weight.put(tensor)
        self._note_bound(self._blocks[index], False)
        if place is not None:
            self._free(place)
        else:
            self._is_scratch_taken = False
            self._device.discard(self._ring.scratch)

    def _free(self, place: Place) -> None:
        place.free.record(self._compute)
        self._device.note_read(place.memory)
        place.is_bound = False

    def _refill(self) -> None:
        """Start copies for the blocks ahead, soonest first, until one's place is still needed by a sooner one."""
        if not self._ring.missing:
            return
        soon: list[int] = []
        for index in self._walk.ahead():
            if not self._ring.places[index].is_held:
                if not self._ring.can_give(index, soon):
                    return
                self._fetch(index)
            soon.append(index)

    def _fetch(self, index: int) -> None:
        source = self._moving[index].source
        assert source is not None
        place = self._ring.give(index, self._copies)
        copy = self._meter.copy(index, source.nbytes)
        if copy is not None:
            copy.begun.record(self._copies)
        self._device.copy(place.memory, source, self._copies, self._compute)
        if copy is not None:
            copy.arrived.record(self._copies)
        place.ready.record(self._copies)

    def _views_of(self, index: int, memory: torch.Tensor) -> list[tuple[Weight, torch.Tensor]]:
        """The block's weights as tensors over `memory`; made once for its place, since making them costs time."""
        views = self._views.get(index)
        if views is None:
            block, cut = self._blocks[index], self._moving[index].cut
            views = ready_to_put(block.views(memory, cut, len(block.weights), block.offset_of(cut)))
            self._views[index] = views
        return views

    # -- a block that only is timed ------------------------------------------------------------------------------

    def _begin_visit(self, index: int) -> None:
        visit = self._meter.visit(index, 0, is_moving=False)
        if visit is None:
            return
        visit.asked.record(self._compute)
        self._visits[index] = visit

    def _end_visit(self, index: int) -> None:
        visit = self._visits.pop(index, None)
        if visit is not None:
            visit.done.record(self._compute)
