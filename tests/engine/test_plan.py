"""The planner: never over budget, nothing lost, evenly spread, and clear when it cannot be done."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.streaming.engine.plan import TINY_BYTES, BlockSizes, BudgetTooSmall, make_plan

MIB = 1024**2
weights = st.lists(st.integers(0, 64 * MIB), min_size=0, max_size=12)
models = st.lists(weights, min_size=1, max_size=30)


def blocks_of(sizes: list[list[int]]) -> list[BlockSizes]:
    return [BlockSizes(f"block.{i}", tuple(sorted(block))) for i, block in enumerate(sizes)]


@settings(max_examples=300, deadline=None)
@given(models, st.integers(0, 2000 * MIB), st.integers(0, 50 * MIB), st.integers(1, 8), st.booleans())
def test_a_plan_is_within_budget_and_accounts_for_every_byte(sizes, budget, outside, prefetch, is_packed):
    total = sum(map(sum, sizes))
    try:
        plan = make_plan(
            blocks_of(sizes), budget_bytes=budget, outside_bytes=outside, prefetch=prefetch, is_packed=is_packed
        )
    except BudgetTooSmall:
        assert budget < outside + total
        return
    assert plan.device_bytes <= budget
    assert plan.resident_bytes + plan.streamed_bytes == total
    for cut, streamed, block in zip(plan.cuts, plan.streamed, blocks_of(sizes), strict=True):
        assert streamed == sum(block.weight_bytes[cut:])
        assert streamed <= (plan.scratch_bytes if is_packed else plan.slot_bytes)
        assert all(size >= TINY_BYTES for size in block.weight_bytes[cut:])
    assert plan.slots == min(prefetch + 1, sum(size > 0 for size in plan.streamed))


@settings(max_examples=100, deadline=None)
@given(models, st.integers(1, 4))
def test_the_message_of_a_budget_too_small_names_one_that_works(sizes, prefetch):
    blocks = blocks_of(sizes)
    least = make_plan(blocks, budget_bytes=None, prefetch=prefetch, stream_all=True)
    enough = min(least.device_bytes, sum(map(sum, sizes)))
    if enough == 0:
        return
    with pytest.raises(BudgetTooSmall) as refused:
        make_plan(blocks, budget_bytes=enough - 1, prefetch=prefetch)
    remedy = re.search(r"raise the budget to ([\d.]+) GiB", str(refused.value))
    assert remedy is not None
    assert make_plan(blocks, budget_bytes=round(float(remedy[1]) * 1024**3), prefetch=prefetch).device_bytes > 0


def test_a_model_that_fits_stays_whole():
    blocks = blocks_of([[MIB, 5 * MIB]] * 4)
    plan = make_plan(blocks, budget_bytes=24 * MIB, outside_bytes=0)
    assert plan.is_resident and plan.ring_bytes == 0
    assert not make_plan(blocks, budget_bytes=24 * MIB, stream_all=True).is_resident


def test_equal_blocks_stream_about_equally():
    blocks = blocks_of([[8 * MIB] * 8] * 40)
    plan = make_plan(blocks, budget_bytes=1280 * MIB, prefetch=2)
    assert max(plan.streamed) - min(plan.streamed) <= 8 * MIB
    # and what is streamed is spread over the walk: no stretch of it has much more than its part
    for start in range(0, 40, 5):
        stretch = sum(plan.streamed[start : start + 5])
        assert abs(stretch - plan.streamed_bytes / 8) <= 16 * MIB


def test_bytes_in_flight_follow_compute_time():
    quick = BlockSizes("quick", (4 * MIB,) * 16, compute_share=1.0)
    slow = BlockSizes("slow", (4 * MIB,) * 16, compute_share=3.0)
    plan = make_plan([quick, slow] * 10, budget_bytes=900 * MIB, prefetch=1)
    assert sum(plan.streamed[1::2]) > 2 * sum(plan.streamed[0::2])


def test_more_memory_streams_less_to_within_one_weight():
    blocks = blocks_of([[3 * MIB, 7 * MIB, 20 * MIB], [MIB, 40 * MIB]] * 8)
    streamed = [
        make_plan(blocks, budget_bytes=budget * MIB, prefetch=2).streamed_bytes for budget in range(130, 560, 10)
    ]
    assert all(less <= more + 20 * MIB for more, less in itertools.pairwise(streamed))
    assert streamed[-1] < 0.15 * streamed[0]


@pytest.mark.parametrize("sizes", [(-1,), (1, -5)])
def test_negative_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="negative"):
        BlockSizes("block.0", sizes)


def test_no_prefetch_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        make_plan([], budget_bytes=0, prefetch=0)
