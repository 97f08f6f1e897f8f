"""Device memory that blocks pass through: equal slots, each travelling with the events that guard it.

In: how many slots of what size. Out: slots, taken and given back. Which block goes where is the pipeline's business.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from .device import Device
from .meter import Visit


class Slot:
    """One block's place on the device.

    `holder` is the block whose bytes are in it or on their way, `visit` the events of that stay: compute waits for the
    visit's `ready` before it reads, and the next copy into the slot waits for its `free`.
    """

    __slots__ = ("holder", "is_bound", "memory", "number", "visit")

    def __init__(self, number: int, memory: torch.Tensor) -> None:
        self.number = number
        self.memory = memory
        self.visit: Visit | None = None
        self.holder: int | None = None
        self.is_bound = False


class Ring:
    """All slots of one model, and the scratch in which packed blocks are restored, one at a time.

    Raises torch.OutOfMemoryError when they do not fit.
    """

    def __init__(self, device: Device, slots: int, slot_bytes: int, scratch_bytes: int = 0) -> None:
        self._device = device
        self.slot_bytes = slot_bytes
        self.scratch = device.allocate(scratch_bytes)
        self.slots = [Slot(number, device.allocate(slot_bytes)) for number in range(slots)]

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def ring_bytes(self) -> int:
        return len(self.slots) * self.slot_bytes + self.scratch.numel()

    def find(self, index: int) -> Slot | None:
        """The slot that holds block `index`, arrived or on its way."""
        for slot in self.slots:
            if slot.holder == index:
                return slot
        return None

    def take(self, keep: Container[int]) -> Slot | None:
        """An unbound slot that holds none of the blocks in `keep`, an empty one first; None if there is none.

        The slot still holds its old block: the taker overwrites it.
        """
        stale = None
        for slot in self.slots:
            if slot.is_bound:
                continue
            if slot.holder is None:
                return slot
            if stale is None and slot.holder not in keep:
                stale = slot
        return stale

    def empty(self, slot: Slot) -> None:
        """Forget what `slot` holds."""
        slot.holder = None
        self._device.discard(slot.memory)

    def check(self) -> None:
        """Prove that no block is held twice and none is bound without being held."""
        held = [slot.holder for slot in self.slots if slot.holder is not None]
        assert len(held) == len(set(held)), f"a block is in two slots: {held}"
        assert all(slot.holder is not None for slot in self.slots if slot.is_bound), "an empty slot is bound"
