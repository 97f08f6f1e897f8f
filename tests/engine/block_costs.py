"""Costs of blocks to plan and forecast with: any, and even ones."""

from __future__ import annotations

from hypothesis import strategies as st
from layerstream.streaming.engine.forecast import BlockCost, Rates

MIB = 1024**2
GIB = 1024**3
RATES = Rates(link=50 * GIB / 1000, restore=1500 * GIB / 1000, tail_ms=4.0)

# Now and then one that is far larger than the others.
moving = st.integers(0, 64 * MIB) | st.integers(0, 64 * MIB) | st.integers(300 * MIB, 600 * MIB)
sizes = st.tuples(st.integers(0, MIB), moving, st.booleans())
times = st.tuples(st.floats(0, 5), st.floats(0, 5), st.sampled_from((1, 1, 1, 3)))
models = st.lists(st.tuples(sizes, times), min_size=1, max_size=40)
rates = st.none() | st.builds(Rates, st.floats(1e5, 1e8), st.floats(1e7, 1e10), st.floats(0, 10))


def blocks_of(model) -> list[BlockCost]:
    return [
        BlockCost(f"block.{i}", fixed, moving, int(0.7 * moving) if can_pack else None, lead, compute, uses)
        for i, ((fixed, moving, can_pack), (lead, compute, uses)) in enumerate(model)
    ]


def even_blocks(count: int, size: int = 80 * MIB, compute_ms: float = 1.0) -> list[BlockCost]:
    return [BlockCost(f"block.{i}", 4096, size, int(0.705 * size), 0.1, compute_ms) for i in range(count)]
