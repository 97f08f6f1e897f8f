"""What stays on the device and what streams: a pure function of sizes and a budget.

In: the byte sizes of every block's weights in layout order, the bytes that must always be resident, a budget.
Out: one cut a block. Weights before the cut stay, the rest streams. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .codec import align

GIB = 1024**3

# A copy below this size costs its latency, not its bytes (4 GB/s at 64 KiB against 55 from 64 MiB up on PCIe 5), so a
# tensor this small is always resident.
TINY_BYTES = 64 * 1024

# Room for a packed block in a slot, as a share of its raw bytes; weights as uneven as any seen take 0.73.
PACKED_SHARE = 0.75


class BudgetTooSmall(ValueError):
    """The budget does not hold the least this model needs; the message says what would."""


@dataclass(frozen=True)
class BlockSizes:
    """One block as the planner sees it: aligned bytes of its weights in layout order, and its share of the compute."""

    name: str
    weight_bytes: tuple[int, ...]
    compute_share: float = 0.0

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.weight_bytes) or self.compute_share < 0:
            raise ValueError(f"block `{self.name}` has a negative size or share")


@dataclass(frozen=True)
class Plan:
    """Where every weight is.

    `cuts[i]` is the index of block i's first streamed weight, `streamed[i]` the bytes from there on; `prefetch` is how
    many blocks are fetched ahead. With `is_packed` they cross the link packed, and the scratch is where they are
    restored.
    """

    cuts: tuple[int, ...]
    streamed: tuple[int, ...]
    prefetch: int
    is_packed: bool
    slots: int
    slot_bytes: int
    outside_bytes: int
    resident_bytes: int
    scratch_bytes: int

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights that are brought to the device in one pass over all blocks, counted as they are used."""
        return sum(self.streamed)

    @property
    def ring_bytes(self) -> int:
        """Slots and the scratch beside them."""
        return self.slots * self.slot_bytes + self.scratch_bytes

    @property
    def device_bytes(self) -> int:
        """All that the plan takes of the device: residents, weights outside blocks, and the ring."""
        return self.outside_bytes + self.resident_bytes + self.ring_bytes

    @property
    def is_resident(self) -> bool:
        return self.streamed_bytes == 0



class _Levels:
    """Every number of bytes a block can stream: streamed[k] is what streams when the first k weights stay."""

    def __init__(self, sizes: BlockSizes) -> None:
        total = sum(sizes.weight_bytes)
        self.name = sizes.name
        self.streamed = [total - kept for kept in accumulate(sizes.weight_bytes, initial=0)]
        self.lowest = 0
        while self.lowest < len(sizes.weight_bytes) and sizes.weight_bytes[self.lowest] < TINY_BYTES:
            self.lowest += 1

    def nearest(self, target_bytes: float) -> int:
        """The cut whose streamed bytes are closest to the target; of two equally close the one that streams less."""
        cuts = range(self.lowest, len(self.streamed))
        return min(cuts, key=lambda cut: (abs(self.streamed[cut] - target_bytes), -cut))


def make_plan(
    blocks: Sequence[BlockSizes],
    *,
    budget_bytes: int | None,
    outside_bytes: int = 0,
    prefetch: int = 1,
    is_packed: bool = False,
    stream_all: bool = False,
) -> Plan:
    """Plan residency for `blocks`, listed in the order they run.

    `budget_bytes` bounds everything the plan puts on the device; None means no bound. `stream_all` streams whatever
    can be, however much room there is. `prefetch` is how many blocks are fetched ahead; the ring has one slot more.

    Raises BudgetTooSmall when even with everything streamed the budget is exceeded.
    """
    if prefetch < 1:
        raise ValueError(f"prefetch is {prefetch}, but at least one block must be fetched ahead")
    levels = [_Levels(block) for block in blocks]
    everything = outside_bytes + sum(level.streamed[0] for level in levels)

    def plan_for(cuts: Sequence[int]) -> Plan:
        streamed = tuple(level.streamed[cut] for level, cut in zip(levels, cuts, strict=True))
        moving = sum(size > 0 for size in streamed)
        largest = max(streamed, default=0)
        return Plan(
            cuts=tuple(cuts),
            streamed=streamed,
            prefetch=prefetch,
            is_packed=is_packed,
            slots=min(prefetch + 1, moving),
            slot_bytes=align(int(PACKED_SHARE * largest)) if is_packed else largest,
            outside_bytes=outside_bytes,
            resident_bytes=everything - outside_bytes - sum(streamed),
            scratch_bytes=largest if is_packed else 0,
        )

    if not stream_all and (budget_bytes is None or everything <= budget_bytes):
        return plan_for([len(level.streamed) - 1 for level in levels])

    least = plan_for([level.lowest for level in levels])
    if budget_bytes is not None and least.device_bytes > budget_bytes:
        raise BudgetTooSmall(_too_small(least, levels, min(least.device_bytes, everything), budget_bytes, prefetch))
    if stream_all or budget_bytes is None:
        return least
    return _fill(levels, plan_for, least, _spread(blocks, levels, plan_for, budget_bytes), budget_bytes)


def _spread(blocks, levels, plan_for, budget_bytes: int):
    """Find the smallest streamed fraction that fits, spread evenly over the walk by error diffusion.

    Bytes in flight should follow compute time, so that the link is as busy under every block; without times a block's
    bytes stand in for them. What a block cannot take exactly, because weights are whole, its successor makes up for.
    """
    shares = [block.compute_share or level.streamed[0] for block, level in zip(blocks, levels, strict=True)]
    if not all(block.compute_share for block in blocks):
        shares = [level.streamed[0] for level in levels]
    movable = sum(level.streamed[level.lowest] for level in levels)
    scale = movable / (sum(shares) or 1)

    def at(fraction: float):
        cuts, owed = [], 0.0
        for level, share in zip(levels, shares, strict=True):
            owed += fraction * share * scale
            cut = level.nearest(owed)
            owed -= level.streamed[cut]
            cuts.append(cut)
        return plan_for(cuts)

    best, low, high = None, 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        candidate = at(middle)
        if candidate.device_bytes <= budget_bytes:
            best, high = candidate, middle
        else:
            low = middle
    return best


def _fill(levels, plan_for, least: Plan, spread: Plan | None, budget_bytes: int) -> Plan:
    """Use what whole weights left over: keep one more weight where most is streamed, as long as it fits."""
    plan = spread or least
    cuts = list(plan.cuts)
    closed: set[int] = set()
    while len(closed) < len(cuts):
        index = max(
            (i for i in range(len(cuts)) if i not in closed), key=lambda i: (levels[i].streamed[cuts[i]], -i)
        )
        if cuts[index] + 1 >= len(levels[index].streamed):
            closed.add(index)
            continue
        cuts[index] += 1
        candidate = plan_for(cuts)
        if candidate.device_bytes <= budget_bytes:
            plan = candidate
        else:
            cuts[index] -= 1
            closed.add(index)
    return plan


def _too_small(
    least: Plan, levels: Sequence[_Levels], enough_bytes: int, budget_bytes: int, prefetch: int
) -> str:
    largest = max(levels, key=lambda level: level.streamed[level.lowest])
    needed = largest.streamed[largest.lowest]
    remedy = f"raise the budget to {_gib(enough_bytes, up=True)}"
    if prefetch > 1 and least.slots > 2:
        one_ahead = least.device_bytes - (least.slots - min(2, least.slots)) * least.slot_bytes
        remedy += f", or lower prefetch_blocks to 1 (then {_gib(one_ahead, up=True)} is enough)"
    return (
        f"the budget of {_gib(budget_bytes)} is too small for this model: `{largest.name}` needs {_mib(needed)} in "
        f"flight, {least.slots} such slots and {_mib(least.outside_bytes + least.resident_bytes)} of weights that "
        f"cannot stream make {_gib(least.device_bytes, up=True)}: {remedy}"
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**2:.0f} MiB"


def _gib(size_bytes: int, up: bool = False) -> str:
    """Two decimals of GiB; a figure that someone will type back in is rounded up."""
    hundredths = -(-size_bytes * 100 // GIB) if up else round(size_bytes * 100 / GIB)
    return f"{hundredths / 100:.2f} GiB"
