"""Passes in which blocks run in another order than the last time, several times, in each other, or not to their end."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from layerstream.streaming.engine.forecast import Form
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.simulated import SimulatedDevice

from walkers import ALL_STREAMED, attach, make_input, make_walker, one_pass, plan_for


@pytest.mark.parametrize(
    "orders",
    [
        [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7], [7], [0, 1, 2, 3, 4, 5, 6, 7]],
        [[0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 7]] * 3,
        [[7, 3, 5, 1], [0, 2, 4, 6], [7, 3, 5, 1], [7, 3, 5, 1]],
        [[], [3], [], [3, 3, 3]],
    ],
    ids=["skipped", "repeated", "changing", "nearly empty"],
)
@pytest.mark.parametrize("prefetch", [1, 3, 7])
def test_departures_cost_copies_and_never_bits(orders, prefetch):
    walker = make_walker()
    x = make_input(walker)
    for seed in range(5):
        session = attach(walker, SimulatedDevice(1 << 30, seed, PlainPacker()))
        for order in orders:
            walker.order = order
            session.unload()
            expected = walker(x)
            session.load(plan_for(session, 0.2, prefetch, is_packed=seed % 2 == 1))
            assert torch.equal(one_pass(session, walker, x), expected)
            assert torch.equal(one_pass(session, walker, x), expected)
        session.close()
    walker.order = list(range(8))


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_blocks_that_run_several_times_are_there_each_time(prefetch, is_packed):
    walker, device = make_walker(), SimulatedDevice(1 << 30, packer=PlainPacker())
    walker.order = [0, 0, 1, 2, 2, 2, 3, 1, 4, 5, 6, 6, 7]
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, device)
    session.load(plan_for(session, ALL_STREAMED, prefetch, is_packed))
    for _ in range(4):
        assert torch.equal(one_pass(session, walker, x), expected)
    last = session.meter.last
    assert (last.hits, last.misses, last.departures) == (len(walker.order), 0, 0)
    session.close()


@pytest.mark.parametrize(
    "order, packed, raw_copies",
    [([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6, 7], range(8), 0), (range(8), (2, 5), 6)],
    ids=["run again at once", "stay restored"],
)
def test_packed_blocks_are_copied_no_more_often_than_they_are_restored(order, packed, raw_copies):
    walker, device = make_walker(), SimulatedDevice(1 << 30, packer=PlainPacker())
    walker.order = list(order)
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, device)
    plan = plan_for(session, ALL_STREAMED, is_packed=True)
    forms = tuple(Form.STREAMED_PACKED if index in packed else Form.STREAMED for index in range(8))
    session.load(replace(plan, forms=forms))
    for _ in range(4):
        assert torch.equal(one_pass(session, walker, x), expected)
    copied_bytes = raw_copies * plan.streamed_bytes // 8 if raw_copies else session.link_bytes
    assert session.meter.last.moved_bytes == copied_bytes
    session.close()


def test_a_block_that_runs_inside_another_keeps_its_host_tensors():
    walker = make_walker()
    x = make_input(walker)
    inner = walker.blocks[7]
    walker.blocks[3].norm.register_forward_hook(lambda module, args, output: inner(output))
    expected = walker(x)
    for is_packed in (False, True):
        session = attach(walker, SimulatedDevice(1 << 30, 2, PlainPacker()))
        session.load(plan_for(session, ALL_STREAMED, prefetch=1, is_packed=is_packed))
        for _ in range(3):
            assert torch.equal(one_pass(session, walker, x), expected)
        session.close()


def assert_streams_as_it_runs(walker, kept: float, is_packed: bool) -> None:
    """Every pass has the bits of the resident one, with every block in its place."""
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30, 4, PlainPacker()))
    session.load(plan_for(session, kept, prefetch=1, is_packed=is_packed))
    for _ in range(5):
        assert torch.equal(one_pass(session, walker, x), expected)
    assert session.meter.total.unplaced == 0
    session.close()
    assert torch.equal(walker(x), expected)


@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5])
@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_a_block_that_runs_inside_itself_has_its_weights_to_the_end(is_packed, kept):
    walker = make_walker()

    def in_halves(block):
        whole = block.forward
        return lambda x: whole(x) if len(x) == 1 else torch.cat([block(x[:1]), whole(x[1:])])

    for block in walker.blocks:
        block.forward = in_halves(block)
    assert_streams_as_it_runs(walker, kept, is_packed)


@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5])
@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_a_block_runs_again_after_an_error_that_the_model_caught(is_packed, kept):
    walker = make_walker()
    tried = set()

    def fail_at_first(layer, _):
        tried.symmetric_difference_update([layer])
        if layer in tried:
            raise ArithmeticError("at the first try")

    def forward(x):
        x = walker.entry(x)
        for block in walker.blocks:
            with suppress(ArithmeticError):
                block(x)
            x = block(x)
        return x

    walker.forward = forward
    for block in walker.blocks:
        block.down.register_forward_pre_hook(fail_at_first)
    assert_streams_as_it_runs(walker, kept, is_packed)


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_a_block_that_another_hook_keeps_from_beginning_is_not_counted(is_packed):
    walker = make_walker()
    is_inside = []

    def refuse(block, _):
        if is_inside:
            raise ArithmeticError("not here")

    def stop_inner(block, args):
        is_inside.append(block)
        with suppress(ArithmeticError):
            walker.blocks[7](args[0])
        is_inside.clear()

    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30, 4, PlainPacker()))
    session.load(plan_for(session, ALL_STREAMED, prefetch=1, is_packed=is_packed))
    one_pass(session, walker, x)
    handles = [walker.blocks[3].norm.register_forward_pre_hook(lambda _, args: stop_inner(walker.blocks[3], args))]
    handles.append(walker.blocks[7].register_forward_pre_hook(refuse, prepend=True))
    for _ in range(3):
        assert torch.equal(one_pass(session, walker, x), expected)
    for handle in handles:
        handle.remove()
    session.close()
    assert torch.equal(walker(x), expected)


class Stop(BaseException):
    """As ComfyUI's interrupt, it is no Exception, so hooks that only see exceptions miss it."""


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("error", [Stop, RuntimeError, torch.OutOfMemoryError])
def test_a_pass_that_breaks_off_leaves_the_next_one_right(error, is_packed):
    walker = make_walker()
    x = make_input(walker)
    expected = walker(x)
    device = SimulatedDevice(1 << 30, 3, PlainPacker())
    session = attach(walker, device)
    session.load(plan_for(session, 0.3, is_packed=is_packed))
    one_pass(session, walker, x)
    used = device.used_bytes

    def fail(*_):
        raise error("in mid-block")

    for index in (0, 3, 7):
        handle = walker.blocks[index].up.register_forward_hook(fail)
        with pytest.raises(error), session.one_pass():
            walker(x)
        handle.remove()
        session.check()
        assert device.used_bytes == used
        assert torch.equal(one_pass(session, walker, x), expected)
    assert session.meter.broken_passes == 3
    session.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in walker.modules())
