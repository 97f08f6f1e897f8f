"""Forecasts: a pass played through on paper never beats its floor, and counts each copy and each restoring."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.streaming.engine.forecast import COPY_LATENCY_MS, SUSTAINED, BlockCost, Form, Rates, forecast, lay_out

from block_costs import GIB, MIB, RATES, blocks_of, even_blocks, models, rates


def test_restoring_what_runs_several_times_takes_as_often():
    blocks = [replace(block, uses=4) for block in even_blocks(10, compute_ms=5.0)]
    found = forecast(blocks, [Form.RESIDENT_PACKED] * 10, 0, 2 * 80 * MIB, RATES)
    assert found.restore_ms == pytest.approx(4 * 10 * 80 * MIB / RATES.restore)


def test_a_forecast_of_copies_that_are_hidden_is_the_compute_time():
    blocks = even_blocks(10, compute_ms=5.0)
    found = forecast(blocks, [Form.STREAMED] * 10, 4 * 80 * MIB, 0, RATES)
    assert found.step_ms == pytest.approx(found.floor_ms, rel=1e-6)
    assert found.floor_ms == pytest.approx(found.compute_ms, rel=0.01)


def test_a_forecast_with_one_place_takes_copies_and_compute_in_turn():
    blocks = even_blocks(10, compute_ms=1.0)
    found = forecast(blocks, [Form.STREAMED] * 10, 80 * MIB, 0, RATES)
    assert found.step_ms == pytest.approx(10 * 1.0 + found.link_ms, rel=0.15)


def test_a_forecast_counts_every_copy_and_every_restoring_unless_its_place_is_its_own():
    blocks = [BlockCost(f"block.{i}", 0, s * MIB, s * MIB // 2, 0.0, 1.0) for i, s in enumerate((57, 57, 36, 9) * 6)]
    total_bytes = sum(block.moving_bytes for block in blocks)
    streamed, packed = [Form.STREAMED] * len(blocks), [Form.RESIDENT_PACKED] * len(blocks)
    for ring_mib in (57, 100, 150, 170, 300):
        found = forecast(blocks, streamed, ring_mib * MIB, 0, RATES)
        copying_ms = total_bytes / (SUSTAINED * RATES.link) + len(blocks) * COPY_LATENCY_MS
        assert found.link_ms == pytest.approx(copying_ms), "every byte crosses the link again in every pass"
        found = forecast(blocks, packed, 0, ring_mib * MIB, RATES)
        assert found.restore_ms == pytest.approx(total_bytes / RATES.restore)
    slow = Rates(link=RATES.link / 100, restore=RATES.restore / 100)
    for found in (forecast(blocks, streamed, GIB, 0, slow), forecast(blocks, packed, 0, GIB, slow)):
        assert found.link_ms == found.restore_ms == 0.0, "there is room for all, so nothing comes twice"
        assert found.step_ms < 1.5 * found.compute_ms


@settings(max_examples=200, deadline=None)
@given(models, st.lists(st.sampled_from(Form), min_size=40, max_size=40), st.floats(1, 8), st.floats(1, 8), rates)
def test_no_forecast_is_below_its_floor(model, forms, ring_places, scratch_places, known):
    blocks = [replace(block, packed_bytes=int(0.7 * block.moving_bytes)) for block in blocks_of(model)]
    largest = max(block.moving_bytes for block in blocks)
    ring, scratch = int(ring_places * largest), int(scratch_places * largest)
    found = forecast(blocks, forms[: len(blocks)], ring, scratch, known or RATES)
    assert found.step_ms >= 0.999 * found.floor_ms


def test_packed_blocks_whose_restored_bytes_stay_do_not_cross_the_link_again():
    known = replace(RATES, tail_ms=0.0)
    found = forecast(even_blocks(2, compute_ms=0.1), [Form.STREAMED_PACKED] * 2, 80 * MIB, 160 * MIB, known)
    assert found.restore_ms == found.link_ms == 0.0 and found.step_ms == pytest.approx(found.compute_ms)
    found = forecast(even_blocks(3, compute_ms=0.1), [Form.STREAMED_PACKED] * 3, 80 * MIB, 160 * MIB, known)
    assert found.step_ms >= found.link_ms > 3.0


def test_the_place_of_a_copy_is_free_once_it_is_restored():
    blocks = even_blocks(10, compute_ms=2.0)
    found = forecast(blocks, [Form.STREAMED_PACKED] * 10, 80 * MIB, 160 * MIB, RATES)
    assert found.step_ms == pytest.approx(found.floor_ms, rel=1e-6), "copied while the one before computes"


def test_restoring_beside_compute_costs_a_share_and_with_one_place_all_of_it():
    blocks = even_blocks(10, compute_ms=5.0)
    packed, ring = [Form.STREAMED_PACKED] * 10, 4 * 80 * MIB
    beside = forecast(blocks, packed, ring, 2 * 80 * MIB, RATES)
    in_turn = forecast(blocks, packed, ring, 80 * MIB, RATES)
    assert beside.step_ms == pytest.approx(beside.floor_ms, rel=1e-6)
    assert in_turn.step_ms == pytest.approx(beside.step_ms + in_turn.restore_ms, rel=0.01)


def test_places_in_the_ring_follow_each_other():
    assert lay_out([100, 100, 100], 512) == [0, 256, 0]
    assert lay_out([256, 256, 512], 768) == [0, 256, 0]


@pytest.mark.parametrize("changes", [{"fixed_bytes": -1}, {"moving_bytes": -5}, {"compute_ms": -0.1}])
def test_negative_sizes_and_times_are_refused(changes):
    with pytest.raises(ValueError, match="negative"):
        BlockCost(**{"name": "block.0", "fixed_bytes": 0, "moving_bytes": 0, **changes})
    with pytest.raises(ValueError, match="used 0 times"):
        BlockCost("block.0", 0, 0, uses=0)
