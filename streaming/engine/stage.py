"""The two stages on the way to the device: copies over the link, and restoring what came packed.

In: the walk, and a ring each. Out: places that hold the blocks ahead, as many as the rings have room for. Each stage
has a stream of its own, so that both run beside compute and beside each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from .device import Device, Stream
from .meter import Meter
from .moving import MovingBlock
from .packing import Decoder
from .ring import Place, Ring
from .staging import Staged, Staging
from .store import Piece
from .walk import Walk


class Stage:
    """Fills `ring` with the blocks that run next."""

    def __init__(
        self,
        device: Device,
        moving: Mapping[int, MovingBlock],
        ring: Ring,
        stream: Stream,
        walk: Walk,
        meter: Meter,
    ) -> None:
        self.ring = ring
        self.stream = stream
        self._device = device
        self._moving = moving
        self._walk = walk
        self._meter = meter

    def refill(self) -> bool:
        """Bring the blocks ahead, soonest first, until one's place is still needed by a sooner one; True if it ends
        before, at a block of which what it is made of is neither there nor on its way.
        """
        missing = self.ring.missing
        if not missing:
            return False
        soon: list[int] = []
        for index in self._walk.ahead():
            if index in missing and not self._is_past(index):
                if not self._can_bring(index):
                    return True
                if not self._start(index, soon):
                    return False
            soon.append(index)
        return False

    def bring_now(self, index: int) -> bool:
        """Have the block in its place, though nobody foresaw it; False where one that is in use lies there."""
        return self.ring.places[index].is_held or self._start(index, soon=())

    def _start(self, index: int, soon: Collection[int]) -> bool:
        """Start bringing the block; False where what is in use or needed `soon` lies in its place."""
        place = self.ring.give(index, self.stream, soon, self._is_past)
        if place is None:
            return False
        try:
            self._bring(index, place)
        except BaseException:
            self.ring.let_go(place)
            raise
        place.ready.record(self.stream)
        return True

    def _is_past(self, index: int) -> bool:
        """Whether the block has left this stage behind and needs no place here before it runs."""
        raise NotImplementedError

    def _can_bring(self, index: int) -> bool:
        """Whether what the block is made of is there, or on its way."""
        raise NotImplementedError

    def _bring(self, index: int, place: Place) -> None:
        """Start bringing the block into `place`, after what the stream waits for already."""
        raise NotImplementedError


class Copying(Stage):
    """Copies into the ring, from slabs or by way of `staging`. What is restored already, in `scratch`, is not copied
    again before it runs. `compute` is the stream that is current meanwhile.
    """

    def __init__(
        self,
        device: Device,
        moving: Mapping[int, MovingBlock],
        ring: Ring,
        scratch: Ring,
        staging: Staging | None,
        walk: Walk,
        meter: Meter,
    ) -> None:
        super().__init__(device, moving, ring, device.copy_stream(), walk, meter)
        self.compute = device.compute_stream()
        self._scratch = scratch
        self._staging = staging

    def refill(self) -> bool:
        is_short = super().refill()
        if self._staging is not None and self.ring.missing:
            self._staging.look_ahead(self._missing_staged(self._staging))
        return is_short

    def _missing_staged(self, staging: Staging) -> Iterator[int]:
        """The blocks ahead that come by way of `staging` and are to be copied."""
        return (
            index
            for index in self._walk.ahead()
            if index in staging and index in self.ring.missing and not self._is_past(index)
        )

    def _is_past(self, index: int) -> bool:
        restored = self._scratch.places.get(index)
        # Where the scratch holds every packed block, what is restored once stays.
        return restored is not None and (restored.is_fresh or not self._scratch.missing)

    def _can_bring(self, index: int) -> bool:
        return self._staging is None or index not in self._staging or self._staging.is_there(index)

    def _bring(self, index: int, place: Place) -> None:
        source, memory = self._moving[index].source, place.memory
        assert source is not None

        def copy(pieces: Sequence[Piece]) -> None:
            timing = self._meter.copy(index, memory.nbytes)
            if timing is not None:
                timing.begun.record(self.stream)
            for begin, stored in pieces:
                self._device.copy(memory[begin : begin + stored.nbytes], stored, self.stream, self.compute)
            if timing is not None:
                timing.ended.record(self.stream)

        if isinstance(source, Staged):
            assert self._staging is not None
            self._staging.send(index, lambda stored: copy((Piece(0, stored),)), self.stream)
        else:
            copy(source)


class Restoring(Stage):
    """Restores packed blocks into the scratch, from where `copied` has their bytes or from where they are kept."""

    def __init__(
        self, device: Device, moving: Mapping[int, MovingBlock], scratch: Ring, copied: Ring, walk: Walk, meter: Meter
    ) -> None:
        super().__init__(device, moving, scratch, device.restore_stream(), walk, meter)
        self._copied = copied
        self._restorers: dict[int, Decoder] = {}

    def forget_places(self) -> None:
        """Take note that the places of both rings are about to lie elsewhere, or to go."""
        self._restorers.clear()

    def _is_past(self, index: int) -> bool:
        return False

    def _can_bring(self, index: int) -> bool:
        return self._moving[index].source is None or self._copied.places[index].is_held

    def _bring(self, index: int, place: Place) -> None:
        moving = self._moving[index]
        assert moving.layout is not None
        arrived = None if moving.source is None else self._copied.places[index]
        restore = self._restorers.get(index)
        if restore is None:  # made once for the two places, since making it takes longer than calling it
            packed = moving.kept() if arrived is None else arrived.memory
            restore = self._restorers[index] = self._device.restorer(packed, moving.layout, place.memory)
        if arrived is not None:
            self.stream.wait_event(arrived.ready)
        timing = self._meter.restore(index, moving.raw_bytes)
        if timing is not None:
            timing.begun.record(self.stream)
        restore(self.stream)
        if timing is not None:
            timing.ended.record(self.stream)
        if arrived is not None:
            arrived.is_fresh = False
            arrived.free.record(self.stream)
            self._device.note_read(arrived.memory, self.stream)
