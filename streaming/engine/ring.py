"""Device memory that blocks pass through: every block has its fixed place in one ring of bytes.

In: the sizes of the blocks that travel, in the order they run, and how large the ring is. Out: places, each with the
events that guard it. Which block is copied when is the pipeline's business.

Places follow each other round and round, so a place is taken by many blocks in turn and a fixed one each still keeps
the ring as full as it can be; the tensors over it are made once. Copies pass through one such ring; what is restored
from packed copies has another, smaller one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping

import torch

from .codec import align
from .device import Device, Event, Stream
from .forecast import lay_out


class Place:
    """Where one block's bytes lie while they are on the device.

    Who reads them waits for `ready` first, and whatever is brought next into any of these bytes waits for `free`. The
    bytes are the block's own while it `is_held`, and kept for its next run while it `is_fresh`; while it `is_bound` its
    forward reads them.
    """

    __slots__ = ("end", "free", "index", "is_bound", "is_fresh", "is_held", "memory", "ready", "start")

    def __init__(self, index: int, device: Device) -> None:
        self.index = index
        self.ready: Event = device.event()
        self.free: Event = device.event()
        self.is_held = False
        self.is_fresh = False
        self.is_bound = False
        self.start = self.end = 0
        self.memory = torch.empty(0)


class Ring:
    """The places of one model's blocks. Raises torch.OutOfMemoryError when they do not fit."""

    def __init__(self, device: Device, sizes: Mapping[int, int], order: Collection[int], ring_bytes: int) -> None:
        self._device = device
        self._sizes = sizes
        self._bytes = max(ring_bytes, max(map(align, sizes.values()), default=0))
        self._memory = device.allocate(self._bytes)
        self.places = {index: Place(index, device) for index in sizes}
        self.missing = set(sizes)
        self._held: list[Place] = []
        self.arrange(order)

    @property
    def ring_bytes(self) -> int:
        return self._memory.numel()

    def arrange(self, order: Collection[int]) -> None:
        """Lay the places out for blocks that run in `order`; what the ring held is forgotten."""
        self.empty()
        order = [index for index in dict.fromkeys((*order, *self._sizes)) if index in self._sizes]
        for index, start in zip(order, lay_out([self._sizes[i] for i in order], self._bytes), strict=True):
            place = self.places[index]
            place.start, place.end = start, start + self._sizes[index]
            place.memory = self._memory[place.start : place.end]

    def give(self, index: int, stream: Stream, soon: Collection[int], is_past: Callable[[int], bool]) -> Place | None:
        """Take the place of block `index` for what `stream` brings, after whatever on the device still reads there.

        None if something lies there that is bound, or that belongs to one of `soon` and `is_past` does not say that
        it has served.
        """
        place = self.places[index]
        start, end = place.start, place.end
        in_the_way = []
        for other in self._held:
            if other.start < end and start < other.end:
                if other.is_bound or (other.index in soon and not is_past(other.index)):
                    return None
                in_the_way.append(other)
        for other in in_the_way:
            stream.wait_event(other.free)
            self.let_go(other)
            self._device.discard(other.memory, stream)
        place.is_held = place.is_fresh = True
        self._held.append(place)
        self.missing.remove(index)
        return place

    def let_go(self, place: Place) -> None:
        """Take note that nothing that anyone wants lies in `place` any more."""
        place.is_held = place.is_fresh = False
        self._held.remove(place)
        self.missing.add(place.index)

    def empty(self) -> None:
        """Forget what the ring holds, but for what is bound."""
        for place in [place for place in self._held if not place.is_bound]:
            self.let_go(place)

    def check(self) -> None:
        """Prove that no two blocks hold the same bytes and that none is bound without being held."""
        held = sorted(self._held, key=lambda place: place.start)
        for first, second in itertools.pairwise(held):
            assert first.end <= second.start, "two blocks hold the same bytes of the ring"
        assert self.missing == {index for index, place in self.places.items() if not place.is_held}
        assert all(place.is_held for place in self.places.values() if place.is_bound), "a block is bound unheld"
