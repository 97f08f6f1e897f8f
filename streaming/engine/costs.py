"""What each block costs, as far as it is known: its bytes, what it packs to, what it took in timed passes.

In: a model taken apart, a meter, the sizes that blocks packed to. Out: what the planner asks for. On a device whose
times mean nothing, no times are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence

import torch

from .block import ModelBlocks
from .device import Device
from .forecast import BlockCost, Rates
from .meter import BlockTimes, Meter
from .moving import cut_of, packable_dtype
from .packing import PACKABLE, expected_share

# What a block is counted as against what it packed to before: patches change that by less.
PACKED_MARGIN = 1.002

# And against what others packed to, while it was not packed itself.
SHARE_MARGIN = 1.01


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
        times, shares = self._times(), self._shares()
        return [self._cost(index, times.get(index), index not in unpacked, shares) for index in order]

    def uses(self, index: int) -> int:
        """How often block `index` is brought in a pass, if it streams; once, as far as was not seen."""
        return _uses(self._times().get(index))

    def _times(self) -> dict[int, BlockTimes]:
        return self._meter.best.blocks if self._meter.best and self._device.has_clock else {}

    def _shares(self) -> dict[torch.dtype, float]:
        """What blocks pack to of their bytes, by dtype: as those did that were packed, or else what is typical."""
        raw_bytes: Counter[torch.dtype] = Counter()
        packed_bytes: Counter[torch.dtype] = Counter()
        for index, stored_bytes in self._packed_bytes.items():
            block = self._blocks[index]
            size_bytes, dtype = block.bytes_from(cut_of(block)), packable_dtype(block)
            if dtype is not None and stored_bytes < size_bytes:
                raw_bytes[dtype] += size_bytes
                packed_bytes[dtype] += stored_bytes
        typical = {dtype: expected_share(dtype) for dtype in PACKABLE}
        return typical | {dtype: SHARE_MARGIN * packed_bytes[dtype] / raw_bytes[dtype] for dtype in raw_bytes}

    def _cost(
        self, index: int, times: BlockTimes | None, may_pack: bool, shares: Mapping[torch.dtype, float]
    ) -> BlockCost:
        block = self._blocks[index]
        cut = cut_of(block)
        fixed, moving = block.offset_of(cut), block.bytes_from(cut)
        packed: int | None = None
        dtype = packable_dtype(block)
        if may_pack and dtype is not None and self._device.packer is not None:
            known = self._packed_bytes.get(index)
            packed = min(moving, int(moving * shares[dtype] if known is None else PACKED_MARGIN * known))
        # A device's clock may tell nonsense now and then, which costs a worse plan and must not cost the run.
        lead_ms, compute_ms = (max(0.0, times.lead_ms), max(0.0, times.compute_ms)) if times else (0.0, 0.0)
        packed = packed if packed != moving else None
        return BlockCost(block.name, fixed, moving, packed, lead_ms, compute_ms, _uses(times))


def _uses(times: BlockTimes | None) -> int:
    return max(1, times.uses) if times else 1
