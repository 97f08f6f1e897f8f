"""The planner: never over budget, nothing lost, evenly spread, as little packed as need be, clear when it cannot."""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.streaming.engine.forecast import COPY_LATENCY_MS, SUSTAINED, BlockCost, Form
from layerstream.streaming.engine.plan import BudgetTooSmall, Packing
from layerstream.streaming.engine.planner import make_plan

from block_costs import GIB, MIB, RATES, blocks_of, even_blocks, models, rates


@settings(max_examples=300, deadline=None)
@given(
    models,
    st.integers(0, 2000 * MIB),
    st.integers(0, 50 * MIB),
    st.integers(0, 8),
    st.sampled_from(Packing),
    rates,
)
def test_a_plan_is_within_budget_and_accounts_for_every_byte(model, budget, outside, prefetch, packing, known):
    blocks = blocks_of(model)
    total = sum(block.fixed_bytes + block.moving_bytes for block in blocks)
    how = {"outside_bytes": outside, "prefetch": prefetch, "packing": packing, "rates": known}
    try:
        plan = make_plan(blocks, budget_bytes=budget, **how)
    except BudgetTooSmall:
        assert budget < outside + total
        return
    assert plan.device_bytes <= budget
    kept = [(block, form) for block, form in zip(blocks, plan.forms, strict=True) if not form.is_streamed]
    assert plan.streamed_bytes + sum(block.passing_bytes for block, _ in kept) == sum(b.passing_bytes for b in blocks)
    assert plan.resident_bytes == sum(block.fixed_bytes for block in blocks) + sum(
        block.bytes_as(form) for block, form in kept
    )
    spare = budget - plan.device_bytes
    for block, form in zip(blocks, plan.forms, strict=True):
        if form.is_streamed:
            size = block.packed_bytes if form.is_packed else block.moving_bytes
            assert not 0 < size <= spare, "no block streams that there is room for"
        assert not form.is_streamed or block.bytes_as(form) <= plan.ring_bytes
        assert not form.is_packed or (block.packed_bytes is not None and block.moving_bytes <= plan.scratch_bytes)
        assert not form.is_packed or packing is not Packing.NEVER
    if plan.expected is not None:
        assert plan.expected.step_ms >= plan.expected.floor_ms * 0.999


@settings(max_examples=100, deadline=None)
@given(models, st.integers(0, 4))
def test_the_message_of_a_budget_too_small_names_one_that_works(model, prefetch):
    blocks = blocks_of(model)
    least = make_plan(blocks, budget_bytes=None, prefetch=prefetch, stream_all=True)
    enough = min(least.device_bytes, sum(block.fixed_bytes + block.moving_bytes for block in blocks))
    if enough == 0:
        return
    with pytest.raises(BudgetTooSmall) as refused:
        make_plan(blocks, budget_bytes=enough - 1, prefetch=prefetch)
    assert make_plan(blocks, budget_bytes=enough, prefetch=prefetch).device_bytes <= enough
    remedy = re.search(r"raise the budget to ([\d.]+) GiB", str(refused.value))
    assert remedy is not None and float(remedy[1]) * GIB < enough + 0.011 * GIB
    assert make_plan(blocks, budget_bytes=round(float(remedy[1]) * GIB), prefetch=prefetch).device_bytes > 0


def test_a_block_that_takes_more_to_restore_than_to_keep_needs_no_more_than_that():
    with pytest.raises(BudgetTooSmall, match=r"raise the budget to 0\.08 GiB"):
        make_plan(even_blocks(1), budget_bytes=79 * MIB, packing=Packing.ALWAYS)


def test_the_scratch_shrinks_where_there_would_be_no_room_for_residents():
    blocks = even_blocks(20)
    wide = make_plan(blocks, budget_bytes=None, stream_all=True, packing=Packing.ALWAYS)
    plan = make_plan(blocks, budget_bytes=wide.device_bytes - 20 * MIB, packing=Packing.ALWAYS)
    assert plan.scratch_bytes < wide.scratch_bytes and plan.streamed_bytes < wide.streamed_bytes


def test_a_model_that_fits_stays_whole():
    blocks = even_blocks(4)
    whole = sum(block.fixed_bytes + block.moving_bytes for block in blocks)
    plan = make_plan(blocks, budget_bytes=whole, rates=RATES)
    assert plan.is_resident and plan.ring_bytes == plan.scratch_bytes == 0
    assert not make_plan(blocks, budget_bytes=whole, stream_all=True).is_resident


def test_what_streams_is_spread_over_the_walk():
    blocks = even_blocks(120)
    plan = make_plan(blocks, budget_bytes=5 * GIB)
    streams = [form.is_streamed for form in plan.forms]
    for start in range(0, 120, 10):
        assert abs(sum(streams[start : start + 10]) - sum(streams) / 12) <= 1.5


def test_bytes_in_flight_follow_compute_time():
    # quick blocks cannot hide a copy, slow ones can: the link keeps pace only if the slow ones stream
    blocks = [BlockCost(f"block.{i}", 0, 80 * MIB, None, 0.0, 0.1 if i % 20 < 10 else 3.0) for i in range(100)]
    plan = make_plan(blocks, budget_bytes=5 * GIB, rates=RATES)
    quick = sum(form.is_streamed for i, form in enumerate(plan.forms) if i % 20 < 10)
    slow = sum(form.is_streamed for i, form in enumerate(plan.forms) if i % 20 >= 10)
    assert slow > 3 * quick
    assert plan.expected.step_ms < 1.01 * plan.expected.compute_ms


def test_nothing_is_packed_while_the_link_keeps_pace():
    plan = make_plan(even_blocks(100, compute_ms=2.0), budget_bytes=5 * GIB, rates=RATES)
    assert not plan.is_packed and plan.expected.limit == "compute"


def test_only_as_much_is_packed_as_lets_the_link_keep_pace():
    blocks = even_blocks(100, compute_ms=0.85)
    plan = make_plan(blocks, budget_bytes=int(2.0 * GIB), rates=RATES)
    packed = sum(form is Form.STREAMED_PACKED for form in plan.forms)
    raw = sum(form is Form.STREAMED for form in plan.forms)
    assert packed and raw and not any(form is Form.RESIDENT_PACKED for form in plan.forms)
    assert plan.expected.step_ms < 1.005 * plan.expected.floor_ms
    never = make_plan(blocks, budget_bytes=int(2.0 * GIB), rates=RATES, packing=Packing.NEVER)
    assert plan.expected.step_ms < 0.85 * never.expected.step_ms


def test_residents_are_packed_where_packing_what_streams_is_not_enough():
    blocks = even_blocks(100, compute_ms=0.6)
    plan = make_plan(blocks, budget_bytes=int(2.5 * GIB), rates=RATES)
    assert sum(form is Form.RESIDENT_PACKED for form in plan.forms) > 10
    assert plan.expected.step_ms < 1.1 * plan.expected.compute_ms


def like_a_unet() -> list[BlockCost]:
    """The outer blocks see large images and have few channels."""
    outer = [BlockCost(f"outer.{i}", 0, 4 * MIB, None, 0.0, 2.0) for i in range(10)]
    inner = [BlockCost(f"inner.{i}", 0, 64 * MIB, 55 * MIB, 0.0, 0.5) for i in range(70)]
    return [*outer[:5], *inner, *outer[5:]]


@pytest.mark.parametrize("blocks", [even_blocks(60, compute_ms=0.5), like_a_unet()], ids=["even", "like a UNet"])
def test_more_memory_never_takes_longer(blocks):
    steps = [
        make_plan(blocks, budget_bytes=budget * MIB, rates=RATES).expected.step_ms for budget in range(400, 4400, 200)
    ]
    assert all(more <= 1.03 * less for less, more in itertools.pairwise(steps))
    assert steps[-1] < 0.65 * steps[0]


def test_most_of_a_model_streams_where_the_blocks_that_compute_long_have_few_bytes():
    blocks = like_a_unet()
    plan = make_plan(blocks, budget_bytes=GIB, rates=RATES, packing=Packing.NEVER)
    assert plan.device_bytes > 0.93 * GIB
    outer = [form for block, form in zip(blocks, plan.forms, strict=True) if block.name.startswith("outer")]
    assert all(form.is_streamed for form in outer)
    everything = make_plan(blocks, budget_bytes=GIB, rates=RATES, packing=Packing.NEVER, stream_all=True)
    assert plan.expected.step_ms < 0.87 * everything.expected.step_ms


def test_a_link_that_cannot_keep_pace_is_never_idle():
    plan = make_plan(even_blocks(80, compute_ms=0.2), budget_bytes=int(0.8 * GIB), rates=RATES, packing=Packing.NEVER)
    assert plan.expected.step_ms < 1.03 * plan.expected.link_ms


def test_what_runs_several_times_crosses_as_often_and_stays_first():
    blocks = even_blocks(40, 10 * MIB, compute_ms=1.0)
    blocks[20:] = [replace(block, uses=3, compute_ms=3.0) for block in blocks[20:]]
    how = {"rates": RATES, "packing": Packing.NEVER}
    everything = make_plan(blocks, budget_bytes=None, stream_all=True, **how)
    assert everything.link_bytes == everything.streamed_bytes == (20 + 3 * 20) * 10 * MIB
    assert everything.expected.link_ms == pytest.approx(
        everything.link_bytes / (SUSTAINED * RATES.link) + 80 * COPY_LATENCY_MS
    )
    half = make_plan(blocks, budget_bytes=200 * MIB, **how)
    kept_once, kept_often = (
        sum(not form.is_streamed for form in half.forms[part]) for part in (slice(20), slice(20, 40))
    )
    assert kept_once == 0 and kept_often == 17
    assert half.expected.link_ms < 0.37 * everything.expected.link_ms
    hurried = [replace(block, lead_ms=0.0, compute_ms=0.1 if block.uses == 1 else 0.6) for block in blocks]
    half = make_plan(hurried, budget_bytes=200 * MIB, **how)
    assert sum(not form.is_streamed for form in half.forms[:20]) > 5, "under these the link has no time for them"
    assert half.expected.step_ms < 1.02 * half.expected.floor_ms


def test_packing_is_chosen_for_all_that_crosses():
    blocks = even_blocks(40, 80 * MIB, compute_ms=2.5)
    plan = make_plan(blocks, budget_bytes=GIB, rates=RATES)
    assert not plan.is_packed
    plan = make_plan([replace(block, uses=2) for block in blocks], budget_bytes=GIB, rates=RATES)
    assert plan.is_packed and plan.link_bytes > 2 * 0.7 * (40 * 80 * MIB - GIB)


def test_a_thousand_blocks_are_planned_in_fifty_milliseconds():
    blocks = [
        BlockCost(f"block.{i}", 4096, (20 + i % 7) * MIB, 15 * MIB, 0.05, 0.2 + 0.1 * (i % 5)) for i in range(1000)
    ]
    took = []
    for _ in range(3):
        begin = time.process_time()
        make_plan(blocks, budget_bytes=8 * GIB, rates=RATES)
        took.append(time.process_time() - begin)
    assert min(took) < 0.05


def test_the_least_plan_streams_everything_whatever_blocks_take():
    blocks = [BlockCost(f"block.{i}", 0, 40 * MIB, 28 * MIB, 0.0, 0.01 if i < 10 else 5.0) for i in range(20)]
    plan = make_plan(blocks, budget_bytes=None, rates=RATES, stream_all=True)
    assert all(form.is_streamed for form in plan.forms)


def test_what_the_least_plan_takes_is_enough():
    for packing, known in itertools.product(Packing, (None, RATES)):
        how = {"rates": known, "packing": packing, "prefetch": 1}
        blocks = even_blocks(20, compute_ms=0.2)
        wide = make_plan(blocks, budget_bytes=None, stream_all=True, **how)
        least = (
            make_plan(blocks, budget_bytes=wide.device_bytes - 1, stream_all=True, **how) if wide.is_packed else wide
        )
        assert all(form.is_streamed for form in least.forms)
        assert (least.scratch_bytes, wide.scratch_bytes) == ((80 * MIB, 160 * MIB) if wide.is_packed else (0, 0))
        assert make_plan(blocks, budget_bytes=least.device_bytes, **how).device_bytes <= least.device_bytes
        with pytest.raises(BudgetTooSmall):
            make_plan(blocks, budget_bytes=least.device_bytes - 1, **how)


def test_forms_stay_as_they_are_where_it_matters_little():
    def with_times(factors: tuple[float, ...]) -> list[BlockCost]:
        return [replace(block, compute_ms=factors[i % 5]) for i, block in enumerate(even_blocks(100))]

    before = make_plan(with_times((1.0, 1.2, 1.4, 1.2, 1.0)), budget_bytes=5 * GIB, rates=RATES)
    after = with_times((1.1, 1.1, 1.4, 1.1, 1.1))
    anew = make_plan(after, budget_bytes=5 * GIB, rates=RATES)
    kept = make_plan(after, budget_bytes=5 * GIB, rates=RATES, present=before.forms)
    moved = [sum(old is not new for old, new in zip(before.forms, plan.forms, strict=True)) for plan in (anew, kept)]
    assert moved[1] < moved[0] / 2
    assert kept.expected.step_ms < 1.02 * anew.expected.step_ms


def test_a_block_far_larger_than_the_others_stays_where_a_ring_that_fits_it_would_take_more():
    blocks = [*even_blocks(20, size=40 * MIB), BlockCost("embedder", 0, 600 * MIB, 400 * MIB, 0.1, 1.0)]
    for stream_all, known in itertools.product((False, True), (None, RATES)):
        plan = make_plan(blocks, budget_bytes=760 * MIB, rates=known, stream_all=stream_all)
        assert plan.forms[-1] is Form.RESIDENT and plan.streamed_bytes > 10 * 40 * MIB
    packed = make_plan(blocks, budget_bytes=900 * MIB, packing=Packing.ALWAYS)
    assert packed.forms[-1] is Form.RESIDENT and packed.is_packed and packed.streamed_bytes < 20 * 40 * MIB
    for count, size in ((20, 40 * MIB), (1, 10 * MIB)):  # where it takes as much either way, it streams
        plan = make_plan([*even_blocks(count, size), *even_blocks(1)], budget_bytes=None, stream_all=True)
        assert all(form.is_streamed for form in plan.forms)
    with pytest.raises(BudgetTooSmall, match=r"block\.0.*40 MiB in flight"):
        make_plan(blocks, budget_bytes=640 * MIB, rates=RATES)


def test_a_negative_prefetch_is_refused():
    with pytest.raises(ValueError, match="prefetch"):
        make_plan([], budget_bytes=0, prefetch=-1)
