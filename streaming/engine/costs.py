"""What each block costs, as far as it is known: its bytes, what it packs to, what it took in timed passes.

In: a model taken apart, a meter, the sizes that blocks packed to. Out: what the planner asks for. On a device whose
times mean nothing, no times are known.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from .block import ModelBlocks
from .device import Device
from .forecast import BlockCost, Rates
from .meter import BlockTimes, Meter
from .moving import cut_of, packable_dtype
from .packing import expected_share


class CostSheet:
    """The costs of one model's blocks now. `packed_bytes` is kept up to date by whoever packs."""

    def __init__(self, parts: ModelBlocks, device: Device, meter: Meter, packed_bytes: Mapping[int, int]) -> None:
        self._blocks = parts.blocks
        self._device = device
        self._meter = meter
        self._packed_bytes = packed_bytes

    @property
    def rates(self) -> Rates | None:
        """Rates of link and restoring; None until passes were timed."""
        return self._meter.rates if self._times() else None

    def order(self) -> list[int]:
        """The blocks in the order they run, as far as it was seen; those that did not run come last."""
        seen = self._times()
        return [*seen, *(index for index in range(len(self._blocks)) if index not in seen)]

    def of(self, order: Sequence[int], unpacked: Container[int] = ()) -> list[BlockCost]:
        """The costs of the blocks in `order`; those in `unpacked` may not be packed."""
        times = self._times()
        return [self._cost(index, times.get(index), index not in unpacked) for index in order]

    def uses(self, index: int) -> int:
        """How often block `index` is brought in a pass, if it streams; once, as far as was not seen."""
        return _uses(self._times().get(index))

    def _times(self) -> dict[int, BlockTimes]:
        return self._meter.best.blocks if self._meter.best and self._device.has_clock else {}

    def _cost(self, index: int, times: BlockTimes | None, may_pack: bool) -> BlockCost:
        block = self._blocks[index]
        cut = cut_of(block)
        fixed, moving = block.offset_of(cut), block.bytes_from(cut)
        packed: int | None = None
        dtype = packable_dtype(block)
        if may_pack and dtype is not None and self._device.packer is not None:
            packed = self._packed_bytes.get(index, int(moving * expected_share(dtype)))
        # A device's clock may tell nonsense now and then, which costs a worse plan and must not cost the run.
        lead_ms, compute_ms = (max(0.0, times.lead_ms), max(0.0, times.compute_ms)) if times else (0.0, 0.0)
        packed = packed if packed != moving else None
        return BlockCost(block.name, fixed, moving, packed, lead_ms, compute_ms, _uses(times))


def _uses(times: BlockTimes | None) -> int:
    return max(1, times.uses) if times else 1
