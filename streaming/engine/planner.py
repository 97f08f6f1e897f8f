"""Makes plans: a pure function of sizes, measured times and a budget.

In: what each block costs, the bytes that must always be resident, a budget, and rates once they were measured. Out: a
`Plan`. `residency` does the arithmetic; here sizes of the rings are tried and what cannot be is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .codec import align
from .forecast import BlockCost, Form, Rates
from .plan import GIB, BudgetTooSmall, Packing, Plan
from .residency import LEAST_DEPTH, Residency

# Sizes of the ring to choose from, in places of the largest size: more places even out more, and hold no residents.
RING_DEPTHS = (LEAST_DEPTH, 3, 4, 6)

# Sizes of the scratch to choose from, in largest packed blocks: with two, one is restored while another computes.
SCRATCH_PLACES = (2.0, 1.5, 1.0)

# The link shall be done in this share of a pass, so that what is uneven has room.
PACES = (0.99, 0.94)

# Where that is not near what it cannot be faster than, because little computes beside many bytes, as within a UNet.
UNEVEN_PACES = (0.8, 0.6)
FAR_FROM_FLOOR = 1.02

# A plan this near to what it cannot be faster than is good enough.
NEAR_FLOOR = 1.003


def make_plan(
    blocks: Sequence[BlockCost],
    *,
    budget_bytes: int | None,
    outside_bytes: int = 0,
    rates: Rates | None = None,
    packing: Packing = Packing.AUTO,
    prefetch: int = 0,
    stream_all: bool = False,
    present: Sequence[Form] | None = None,
) -> Plan:
    """Plan residency for `blocks`, listed in the order they run.

    `budget_bytes` bounds everything the plan puts on the device; None means no bound. `stream_all` streams whatever
    can be, however much room there is. `prefetch` is how many of the largest blocks the ring holds beside the one
    that computes, 0 for what suits best. Without `rates` nothing is known of time: blocks are spread by bytes, and
    travel as they are unless `packing` is `ALWAYS`. Where it matters little, forms stay as they are in `present`.

    Raises BudgetTooSmall when even with everything streamed the budget is exceeded.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch is {prefetch}: it is a number of blocks, or 0 to have it chosen")
    residency = Residency(blocks, outside_bytes, rates, packing, present)
    resident = residency.plan([Form.RESIDENT] * len(blocks), 0, 0.0)
    if not stream_all and (budget_bytes is None or resident.device_bytes <= budget_bytes):
        return resident
    depths = (prefetch + 1,) if prefetch else RING_DEPTHS if rates else RING_DEPTHS[:1]
    least = residency.stream_everything(depths[0], PACES[0], SCRATCH_PLACES[-1])
    if budget_bytes is not None and least.device_bytes > budget_bytes:
        raise BudgetTooSmall(_too_small(residency, least, min(least.device_bytes, resident.device_bytes), budget_bytes))
    if budget_bytes is None or stream_all:
        wider = residency.stream_everything(depths[0], PACES[0], SCRATCH_PLACES[0])
        return wider if budget_bytes is None or wider.device_bytes <= budget_bytes else least
    best = _best(residency, budget_bytes, depths, is_timed=rates is not None)
    return best or residency.filled(least, budget_bytes, SCRATCH_PLACES[-1])


def _best(residency: Residency, budget_bytes: int, depths: Sequence[int], *, is_timed: bool) -> Plan | None:
    """The best plan for the budget, trying sizes of ring and scratch; None when no residents fit beside them."""
    best: Plan | None = None
    chosen = depths[0], PACES[0]
    rounds: list[tuple[tuple[float, ...], float]] = [(PACES[:1], NEAR_FLOOR)]
    if is_timed and residency.can_pack and residency.packing is Packing.AUTO:
        rounds = [(PACES, NEAR_FLOOR), (UNEVEN_PACES, FAR_FROM_FLOOR)]
    for paces, near in rounds:
        for depth, pace in itertools.product(depths, paces):
            if best is not None and best.expected and best.expected.step_ms <= near * best.expected.floor_ms:
                break  # a larger ring holds no residents, so it has no lower floor
            plan = residency.within(budget_bytes, depth, pace, SCRATCH_PLACES[0])
            if _is_better(plan, best):
                best, chosen = plan, (depth, pace)
    if residency.uses > 1 and _is_better(plan := residency.lightest(budget_bytes, *chosen, SCRATCH_PLACES[0]), best):
        best = plan
    if best is None or (is_timed and best.is_packed):
        for scratch_places in SCRATCH_PLACES[1:]:
            plan = residency.within(budget_bytes, *chosen, scratch_places)
            if _is_better(plan, best):
                best = plan
    return best


def _is_better(plan: Plan | None, than: Plan | None) -> bool:
    return plan is not None and (than is None or _rank(plan) < _rank(than))


def _rank(plan: Plan) -> tuple[float, int]:
    """The lower the better: of plans that take the same time, the one that moves less leaves the link to others."""
    return (plan.expected.step_ms if plan.expected else 0.0, plan.link_bytes)


def _too_small(residency: Residency, least: Plan, enough_bytes: int, budget_bytes: int) -> str:
    streamed = [block for index, block in enumerate(residency.blocks) if index not in residency.giants]
    if not streamed:
        return (
            f"the budget of {_gib(budget_bytes)} is too small for {_mib(enough_bytes)} of weights that cannot stream: "
            f"raise the budget to {_gib(enough_bytes, up=True)}"
        )
    largest = max(streamed, key=lambda block: block.moving_bytes)
    places = round(least.ring_bytes / max(1, align(largest.moving_bytes)), 1)
    remedy = f"raise the budget to {_gib(enough_bytes, up=True)}"
    if places > 2:
        one_ahead = least.device_bytes - least.ring_bytes + 2 * align(largest.moving_bytes)
        remedy += f", or lower prefetch_blocks to 1 (then {_gib(one_ahead, up=True)} is enough)"
    return (
        f"the budget of {_gib(budget_bytes)} is too small for this model: `{largest.name}` needs "
        f"{_mib(largest.moving_bytes)} in flight, {places:g} such places and "
        f"{_mib(least.outside_bytes + least.resident_bytes)} of weights that cannot stream make "
        f"{_gib(least.device_bytes, up=True)}: {remedy}"
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**2:.0f} MiB"


def _gib(size_bytes: int, up: bool = False) -> str:
    """Two decimals of GiB; a figure that someone will type back in is rounded up."""
    hundredths = -(-size_bytes * 100 // GIB) if up else round(size_bytes * 100 / GIB)
    return f"{hundredths / 100:.2f} GiB"
