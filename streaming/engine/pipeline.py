"""The runner: fetch, restore, wait, bind, free. It owns the streams beside compute and decides what runs on them when.

In: blocks with their host bytes, two rings, a walk. Out: for the time of a block's forward its module holds device
tensors, at all other times host tensors. What travels packed passes through both rings, what travels as it is through
the first alone.

Ordering, which is all there is to get right:
1. a copy or a restored block goes into a place only after the `free` event of what lay there, so it never overwrites
   what is still read;
2. compute, and restoring, wait for the `ready` event of the place they read, so they never read what has not arrived;
3. all copies are on one stream and all restoring is on another, so what goes into the same bytes keeps its order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .block import Block, Slot, slots_for
from .device import Device
from .meter import Meter, Visit
from .moving import MovingBlock
from .ring import Place, Ring
from .stage import Copying, Restoring, Stage
from .staging import Staged, Staging
from .walk import Walk

NoteBound = Callable[[Block, bool], None]
"""Told that the weights of a block came to the device (True), or went back to the host."""

Before = list[tuple[dict[str, Any], str, torch.Tensor]]
"""What modules held: a `Slot` each, which would take longer to make."""


class Pipeline:
    """Brings blocks to the device in time. Every method is called by the thread that runs the model.

    `moving` are the blocks that are streamed or restored, by their index in `blocks`; the others are only timed.
    `ring` has the places of those that are copied, `scratch` of those that are restored; what is not in locked memory
    comes by way of `staging`, which ends with this.
    """

    def __init__(
        self,
        device: Device,
        blocks: Sequence[Block],
        moving: Mapping[int, MovingBlock],
        ring: Ring,
        scratch: Ring,
        staging: Staging | None,
        walk: Walk,
        meter: Meter,
        note_bound: NoteBound,
    ) -> None:
        self._device = device
        self._blocks = blocks
        self._moving = moving
        self._walk = walk
        self._meter = meter
        self._note_bound = note_bound
        self._staging = staging
        self._copying = Copying(device, moving, ring, scratch, staging, walk, meter)
        self._restoring = Restoring(device, moving, scratch, ring, walk, meter)
        self._slots: dict[int, list[Slot]] = {}
        self._bound: dict[int, tuple[Place, Visit | None, Before]] = {}
        self._visits: dict[int, Visit] = {}
        self._compute = device.compute_stream()
        # Brackets stay for the run, since making them costs time in each pass, and do nothing between passes.
        self._is_in_pass = False
        self._running: list[int] = []
        self._brackets: list[torch.utils.hooks.RemovableHandle] = []
        for index in moving:
            self._brackets += self._bracket(index, self._arrive, self._leave)
        self._timers: list[torch.utils.hooks.RemovableHandle] = []
        self._settle()  # a fresh ring may lie where compute still reads what was there before

    def _bracket(
        self, index: int, before: Callable[[int], None], after: Callable[[int], None]
    ) -> list[torch.utils.hooks.RemovableHandle]:
        """Have `before` and `after` called around what a block does in a pass, once where it runs inside itself."""

        def enter(module: torch.nn.Module, args: tuple) -> None:
            if self._is_in_pass:
                is_inner = index in self._running
                self._running.append(index)
                if not is_inner:
                    before(index)

        def leave(module: torch.nn.Module, args: tuple, output: object) -> None:
            # After an error it is called without `enter` too, where something else was called first and failed.
            if self._is_in_pass and index in self._running:
                self._running.remove(index)
                if index not in self._running:
                    after(index)

        module = self._blocks[index].module
        entering = module.register_forward_pre_hook(enter, prepend=True)
        # After an error too: the model may catch it and go on.
        return [entering, module.register_forward_hook(leave, always_call=True)]

    def _settle(self) -> None:
        """Order both stages after everything given to the device so far: no place knows who reads its bytes."""
        given = self._device.event()
        given.record(self._compute)
        self._restoring.stream.wait_event(given)
        restored = self._device.event()
        restored.record(self._restoring.stream)
        self._copying.stream.wait_event(given)
        self._copying.stream.wait_event(restored)

    # -- a pass --------------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Fetch the first blocks; from now on blocks that run are served."""
        self._compute = self._device.compute_stream()
        self._copying.compute = self._compute
        self._meter.begin_pass(self._compute)
        self._walk.begin()
        if self._meter.is_timing:
            for index in range(len(self._blocks)):
                if index not in self._moving:
                    self._timers += self._bracket(index, self._begin_visit, self._end_visit)
        self._is_in_pass = True
        self._running.clear()
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
        if not whole:  # nothing is learned from it
            if self._staging is not None:
                self._staging.discard()  # what was read ahead may have failed with it, and shall not fail the next pass
        elif self._walk.finish():
            self._copying.ring.arrange(self._walk.order)
            self._restoring.ring.arrange(self._walk.order)
            self._restoring.forget_places()
            self._slots.clear()
            self._settle()
        self._meter.finish_pass(whole)

    def discard(self) -> None:
        """Forget everything fetched ahead, after waiting for what is under way: host bytes are about to change."""
        self._copying.stream.synchronize()
        if self._staging is not None:
            self._staging.discard()
        self._copying.ring.empty()
        self._restoring.ring.empty()
        self._settle()

    def close(self) -> None:
        """Remove the brackets and wait for what is under way, so that slabs and rings may go."""
        for bracket in self._brackets:
            bracket.remove()
        self._brackets.clear()
        self._meter.close_trace(self._device.compute_stream())
        self._copying.stream.synchronize()
        self._restoring.stream.synchronize()
        if self._staging is not None:
            self._staging.close()
        self._meter.collect(wait=True)
        self._slots.clear()
        # The traceback of an error may hold this, while what is kept packed leaves the device to make room.
        self._restoring.forget_places()

    # -- a block -------------------------------------------------------------------------------------------------

    def _arrive(self, index: int) -> None:
        place = self._called_for(index)
        if place is not None:
            slots = self._slots_of(index, place.memory)
        else:  # it runs inside another one
            self._meter.current.unplaced += 1
            if not self._moving[index].differs:
                return  # its host tensors are in its module, and the host casts those
            place = self._aside(index)
            slots = self._make_slots(index, place.memory)
        visit = self._meter.visit(index)
        if visit is not None:
            visit.asked.record(self._compute)
        self._compute.wait_event(place.ready)
        place.is_bound, place.is_fresh = True, False
        if visit is not None:
            visit.running.record(self._compute)
        self._bound[index] = place, visit, [(table, name, table[name]) for table, name, _ in slots]
        for table, name, tensor in slots:
            table[name] = tensor
        self._note_bound(self._blocks[index], True)

    def _called_for(self, index: int) -> Place | None:
        """The place of a block that starts now, brought late if need be; None if its bytes are taken."""
        counts = self._meter.current
        counts.departures += self._walk.arrive(index)
        moving = self._moving[index]
        last: Stage = self._copying if moving.layout is None else self._restoring
        place = last.ring.places[index]
        if place.is_held:
            counts.hits += 1
            return place
        counts.misses += 1
        is_there = moving.source is None or self._copying.bring_now(index)
        return place if is_there and last.bring_now(index) else None

    def _aside(self, index: int) -> Place:
        """Restore a packed block into memory of its own, while compute waits."""
        moving, compute = self._moving[index], self._compute
        assert moving.layout is not None
        if moving.source is None:
            packed = moving.kept()
        else:
            source = moving.source
            if isinstance(source, Staged):
                stored = torch.empty(source.nbytes, dtype=torch.uint8)
                source.read_into(stored)
            else:
                ((_, stored),) = source  # what is packed lies in one piece
            packed = self._device.allocate(stored.nbytes)
            self._device.copy(packed, stored, compute, compute)
        place = Place(index, self._device)
        place.memory = self._device.allocate(moving.raw_bytes)
        self._device.restorer(packed, moving.layout, place.memory)(compute)
        place.ready.record(compute)
        return place

    def _leave(self, index: int) -> None:
        if index in self._bound:
            self._unbind(index)
            self._refill()

    def _unbind(self, index: int) -> None:
        place, visit, before = self._bound.pop(index)
        if visit is not None:
            visit.done.record(self._compute)
        for table, name, tensor in before:
            table[name] = tensor
        self._note_bound(self._blocks[index], False)
        place.free.record(self._compute)
        self._device.note_read(place.memory, self._compute)
        place.is_bound = False
        place.is_fresh = next(self._walk.ahead(), None) == index  # it runs again at once, and nothing comes in between

    def _refill(self) -> None:
        """Start what can be started: restoring leaves room for copies, and a copy on its way can be restored next."""
        lacks_copy = self._restoring.refill()
        self._copying.refill()
        if lacks_copy:
            self._restoring.refill()

    def _slots_of(self, index: int, memory: torch.Tensor) -> list[Slot]:
        """The block's weights as tensors over `memory`; made once for its place, since making them costs time."""
        slots = self._slots.get(index)
        if slots is None:
            slots = self._slots[index] = self._make_slots(index, memory)
        return slots

    def _make_slots(self, index: int, memory: torch.Tensor) -> list[Slot]:
        block, cut = self._blocks[index], self._moving[index].cut
        return slots_for(block.views(memory, cut, len(block.weights), block.offset_of(cut)))

    # -- a block that only is timed ------------------------------------------------------------------------------

    def _begin_visit(self, index: int) -> None:
        visit = self._meter.visit(index, is_moving=False)
        if visit is None:
            return
        visit.asked.record(self._compute)
        self._visits[index] = visit

    def _end_visit(self, index: int) -> None:
        visit = self._visits.pop(index, None)
        if visit is not None:
            visit.done.record(self._compute)
