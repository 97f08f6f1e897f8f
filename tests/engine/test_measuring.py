"""What passes take is measured once a plan, inside a run, and planned with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layerstream.streaming.engine import meter, simulated
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.plan import Packing
from layerstream.streaming.engine.simulated import SimulatedDevice

from steady_clock import give_steady_clock
from walkers import attach, make_input, make_walker, one_pass, plan_for


@pytest.fixture(autouse=True)
def steady_times(monkeypatch):
    """Passes take the same times, so that what is measured anew depends on the plans alone."""
    give_steady_clock(monkeypatch)


def test_what_a_pass_took_is_measured_and_planned_with(monkeypatch):
    monkeypatch.setattr(meter, "TELLING_COPY_BYTES", 1)
    walker = make_walker(count=12)
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30, packer=PlainPacker(), has_clock=True))
    session.load(plan_for(session, 0.4))
    assert session.expect(session.plan) is None
    one_pass(session, walker, x)
    one_pass(session, walker, x)
    assert not session.measure()
    one_pass(session, walker, x)
    assert session.measure() and not session.measure()
    times = session.meter.times
    assert list(times.blocks) == list(range(12))
    assert all(block.compute_ms > 0 for block in times.blocks.values())
    parts = sum(times.total_ms(part) for part in ("lead_ms", "wait_ms", "restore_ms", "compute_ms")) + times.tail_ms
    assert parts == pytest.approx(times.pass_ms, rel=1e-3)
    session.meter.best = replace(session.meter.best, tail_ms=session.meter.best.tail_ms + 1e-3)
    assert not session.measure(), "as long as before"
    quicker = {
        index: replace(block, compute_ms=0.1 * block.compute_ms, lead_ms=0.1 * block.lead_ms)
        for index, block in times.blocks.items()
    }
    session.meter.best = replace(times, blocks=quicker, tail_ms=0.1 * times.tail_ms)
    assert session.measure() and not session.measure(), "far less than the plan was made for"
    session.meter.best = times
    forecast = session.expect(session.plan)
    assert 0 < forecast.compute_ms <= 1.001 * (parts - times.total_ms("wait_ms"))
    session.load(session.propose(session.plan.device_bytes + 400_000))
    assert torch.equal(one_pass(session, walker, x), expected)


def test_a_copy_that_is_held_up_says_nothing_of_the_link(monkeypatch):
    class HoldingUp(SimulatedDevice):
        ticks = 0

        def copy(self, destination, source, stream, compute) -> None:
            super().copy(destination, source, stream, compute)
            self.copies = getattr(self, "copies", 0) + 1
            if self.copies % 12 == 5:
                stream.append(lambda: [simulated.time.perf_counter() for _ in range(self.ticks)])

    def link_of(ticks: int) -> float:
        walker = make_walker(count=12)
        x = make_input(walker)
        device = HoldingUp(1 << 30, has_clock=True)
        device.ticks = ticks
        session = attach(walker, device)
        session.load(plan_for(session, 0.0))
        for _ in range(3):
            one_pass(session, walker, x)
        assert session.measure()
        return session.meter.rates.link

    monkeypatch.setattr(meter, "TELLING_COPY_BYTES", 1)
    assert link_of(10_000) == pytest.approx(link_of(0), rel=0.2)


def test_a_block_that_runs_several_times_is_brought_and_counted_as_often(monkeypatch):
    monkeypatch.setattr(meter, "TELLING_COPY_BYTES", 1)
    walker = make_walker(count=12)
    walker.order = [0, 1, 2, 2, 2, *range(3, 12), *range(4, 9), *range(4, 9)]
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30, has_clock=True))
    session.load(plan_for(session, 0.0))
    assert session.link_bytes == session.plan.link_bytes, "nothing is known of how often blocks run"
    for _ in range(4):
        assert torch.equal(one_pass(session, walker, x), expected)
        session.measure()
    uses = {index: times.uses for index, times in session.meter.best.blocks.items()}
    assert uses == {index: 3 if index in range(4, 9) else 1 for index in range(12)}, (
        "at once after itself it is still there"
    )
    assert 0.9 * session.link_bytes < session.meter.last.moved_bytes <= session.link_bytes, "one may still be there"
    assert session.link_bytes > 1.5 * session.plan.link_bytes
    assert session.propose(None, stream_all=True, packing=Packing.NEVER).link_bytes == session.link_bytes
    session.load(session.propose(session.plan.device_bytes + 400_000, packing=Packing.NEVER))
    resident = {index for index, form in enumerate(session.plan.forms) if not form.is_streamed}
    assert resident and resident < set(range(4, 9)), "those that cross most often stay first"
    assert torch.equal(one_pass(session, walker, x), expected)


@pytest.fixture
def timed(monkeypatch):
    """A loaded session whose times are believed, and a function that runs passes: what was measured before each."""
    monkeypatch.setattr(meter, "TELLING_COPY_BYTES", 1)
    walker = make_walker(count=12)
    session = attach(walker, SimulatedDevice(1 << 30, packer=PlainPacker(), has_clock=True))
    session.load(plan_for(session, 0.4))

    def run(passes: int) -> list[bool]:
        measured = []
        for _ in range(passes):
            measured.append(session.measure())
            one_pass(session, walker, make_input(walker))
        return measured

    return session, run


def test_when_times_are_forgotten_the_next_ones_are_measured_and_nothing_before(timed):
    session, run = timed
    assert run(5) == [False, False, False, True, False]
    session.end_run()
    session.take_times(None)
    assert run(5) == [False, False, False, True, False]
    session.take_times(None)
    assert run(5) == [False, False, False, True, False], "in mid-run too"
    assert session.expect(session.plan) is not None


def test_what_short_runs_took_is_measured_inside_a_run(timed):
    session, run = timed
    assert run(3) == [False, False, False]
    session.end_run()
    assert run(3) == [False, True, False], "before the first pass nothing shows what compute takes of the device"


def test_times_that_cannot_be_are_planned_with_all_the_same(timed):
    session, run = timed
    run(5)
    best = session.meter.best
    first, *_ = best.blocks
    nonsense = replace(best.blocks[first], compute_ms=-3.0, lead_ms=-1.0)
    session.meter.best = replace(best, blocks={**best.blocks, first: nonsense})
    plan = session.propose(session.plan.device_bytes + 400_000)
    assert plan.expected is not None and plan.expected.step_ms > 0


def test_passes_that_run_no_block_measure_nothing(timed):
    session, run = timed
    order, session.parts.outside.module.order = session.parts.outside.module.order, []
    assert run(5) == [False] * 5
    session.parts.outside.module.order = order
    assert session.meter.best is None and session.expect(session.plan) is None


def test_times_known_when_a_plan_was_made_are_not_measured_under_it(timed):
    session, run = timed
    run(3)
    session.end_run()
    session.load(session.propose(session.plan.device_bytes + 400_000))
    assert run(5) == [False, False, False, True, False]


def test_what_was_measured_inside_a_run_holds_for_the_next_ones(timed):
    session, run = timed
    run(4)
    for budget_bytes in (session.plan.device_bytes, session.plan.device_bytes + 400_000):
        session.end_run()
        session.load(session.propose(budget_bytes))
        best = session.meter.best
        assert run(5) == [False] * 5
    assert session.meter.best is not best, "under another plan one pass is timed"
    session.meter.best = replace(
        session.meter.best, tail_ms=0.0, blocks={index: meter.BlockTimes(uses=1) for index in range(12)}
    )
    assert session.measure(), "far less than the plan was made for"


def test_a_plan_that_was_made_inside_a_run_is_measured_once_more(timed):
    session, run = timed
    assert run(4) == [False, False, False, True]
    session.load(session.propose(session.plan.device_bytes + 400_000))
    assert run(5) == [False, False, False, True, False]
