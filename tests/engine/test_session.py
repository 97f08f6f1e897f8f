"""A streamed model gives the bits of the resident one, whatever happens in between, and leaves nothing behind.

The simulated device delays copies at random, poisons what is freed and refuses to exceed its budget, so a result that
is right here has its ordering right.
"""

from __future__ import annotations

import gc
import itertools
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from layerstream.streaming.engine.block import take_apart
from layerstream.streaming.engine.forecast import Form
from layerstream.streaming.engine.moving import cut_of
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.simulated import SimulatedDevice

from walkers import ALL_STREAMED, attach, make_input, make_walker, one_pass, plan_for


@pytest.mark.parametrize("prefetch", [1, 2, 4, 8])
@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5, 0.95])
@pytest.mark.parametrize("inner", [(512,), (1024, 512, 640)], ids=["even", "uneven"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_every_pass_equals_the_resident_one(prefetch, kept, inner, is_packed):
    walker = make_walker(count=12 if is_packed else 24, inner=inner)  # the plain packer takes its time
    for seed, batch in itertools.product(range(2 if is_packed else 5), (1, 2)):
        x = make_input(walker, batch)
        expected = walker(x)
        device = SimulatedDevice(1 << 30, seed, PlainPacker())
        session = attach(walker, device)
        plan = plan_for(session, kept, prefetch, is_packed)
        device.budget_bytes = plan.device_bytes  # the plan must need no byte more than it says
        session.load(plan)
        for _ in range(4):
            assert torch.equal(one_pass(session, walker, x), expected)
        # blocks that have a place of their own are fetched once and stay
        assert (session.meter.last.moved_bytes > 0) == (session.link_bytes > plan.ring_bytes)
        assert session.meter.last.moved_bytes <= session.link_bytes
        shares = (0.6, 0.75) if is_packed else (1, 1)
        assert shares[0] * plan.streamed_bytes <= session.link_bytes <= shares[1] * plan.streamed_bytes
        assert session.meter.total.misses == session.meter.total.departures == session.meter.total.unplaced == 0
        session.close()
        assert torch.equal(walker(x), expected)


def test_nothing_is_left_after_close():
    walker, device = make_walker(), SimulatedDevice(1 << 30)
    before = {name: id(tensor.untyped_storage()) and tensor.clone() for name, tensor in walker.state_dict().items()}
    session = attach(walker, device)
    session.load(plan_for(session, 0.5))
    one_pass(session, walker, make_input(walker))
    session.close()
    session.close()
    del session
    gc.collect()
    assert device.used_bytes == 0 and device.locked_bytes == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in walker.modules())
    assert {name: tensor.tolist() for name, tensor in walker.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }


def test_host_memory_holds_each_streamed_weight_once():
    walker = make_walker()
    session = attach(walker, SimulatedDevice(1 << 30))
    session.load(plan_for(session, ALL_STREAMED))
    assert session.host_bytes == session.plan.streamed_bytes
    for block in session.parts.blocks:
        for weight in block.weights[cut_of(block) :]:
            assert weight.current().data_ptr() == weight.home.data_ptr()


def test_a_home_that_is_kept_comes_back_when_the_session_ends():
    walker = make_walker()
    addresses = {name: tensor.data_ptr() for name, tensor in walker.state_dict().items()}
    session = attach(walker, SimulatedDevice(1 << 30), keep_home=lambda tensor: True)
    session.load(plan_for(session, 0.3))
    assert {n: t.data_ptr() for n, t in walker.state_dict().items()} != addresses
    session.close()
    assert {n: t.data_ptr() for n, t in walker.state_dict().items()} == addresses


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


def test_out_of_memory_while_loading_unloads_everything():
    walker = make_walker()
    x = make_input(walker)
    expected = walker(x)
    device = SimulatedDevice(1 << 30)
    session = attach(walker, device)
    plan = plan_for(session, 0.8)
    device.budget_bytes = plan.resident_bytes // 2
    with pytest.raises(torch.OutOfMemoryError):
        session.load(plan)
    assert device.used_bytes == 0
    assert torch.equal(walker(x), expected)
    device.budget_bytes = plan.device_bytes
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_a_ring_that_does_not_fit_is_refused_with_what_it_takes_and_fits_when_there_is_room(is_packed):
    walker, device = make_walker(), SimulatedDevice(1 << 30, packer=PlainPacker())
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, device)
    plan = plan_for(session, 0.3, is_packed=is_packed)
    session.load(plan)
    used = device.used_bytes
    device.budget_bytes = used + plan.ring_bytes - 1
    with pytest.raises(torch.OutOfMemoryError, match=r"pass through and [01] MiB to be restored .* smaller budget"):
        one_pass(session, walker, x)
    assert device.used_bytes == used and not session.is_in_run and not session.is_running
    device.budget_bytes = plan.device_bytes
    assert torch.equal(one_pass(session, walker, x), expected)


def test_plans_can_change_between_passes_without_exceeding_either():
    walker = make_walker(count=10, inner=(512, 768))
    x = make_input(walker)
    expected = walker(x)
    device = SimulatedDevice(1 << 30, seed=1)
    session = attach(walker, device)
    previous = 0
    for kept in (0.1, 0.9, 0.5, 1.0, 0.0, 0.7):
        plan = plan_for(session, kept)
        device.budget_bytes = max(previous, plan.device_bytes)
        session.load(plan)
        previous = plan.device_bytes
        assert torch.equal(one_pass(session, walker, x), expected)


def test_loading_the_same_plan_again_moves_and_locks_nothing():
    walker, device = make_walker(), SimulatedDevice(1 << 30)
    session = attach(walker, device)
    plan = plan_for(session, 0.5)
    session.load(plan)
    tensors = {name: tensor.data_ptr() for name, tensor in walker.state_dict().items()}
    locked = device.locked_bytes
    session.load(plan)
    assert {name: tensor.data_ptr() for name, tensor in walker.state_dict().items()} == tensors
    assert device.locked_bytes == locked


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


@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5])
@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_a_block_that_runs_inside_itself_has_its_weights_to_the_end(is_packed, kept):
    walker = make_walker()

    def in_halves(block):
        whole = block.forward
        return lambda x: whole(x) if len(x) == 1 else torch.cat([block(x[:1]), whole(x[1:])])

    for block in walker.blocks:
        block.forward = in_halves(block)
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
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30, 4, PlainPacker()))
    session.load(plan_for(session, kept, prefetch=1, is_packed=is_packed))
    for _ in range(5):
        assert torch.equal(one_pass(session, walker, x), expected)
    assert session.meter.total.unplaced == 0
    session.close()
    assert torch.equal(walker(x), expected)


def test_evicted_blocks_come_back_with_the_next_load():
    walker, device = make_walker(), SimulatedDevice(1 << 30)
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, device)
    plan = plan_for(session, 0.6)
    session.load(plan)
    before = device.used_bytes
    freed = session.evict(plan.resident_bytes // 2)
    assert freed >= plan.resident_bytes // 2
    assert device.used_bytes == before - freed
    session.load(plan)
    assert session.resident_bytes == device.used_bytes == before
    assert torch.equal(one_pass(session, walker, x), expected)


def test_a_weight_shared_by_blocks_stays_resident():
    walker = make_walker()
    walker.blocks[5].up.weight = walker.blocks[2].up.weight
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30))
    assert [weight.keys for weight in session.parts.outside.weights if len(weight.keys) > 1] == [
        ("blocks.2.up.weight", "blocks.5.up.weight")
    ]
    session.load(plan_for(session, ALL_STREAMED))
    assert torch.equal(one_pass(session, walker, x), expected)


def test_blocks_inside_blocks_are_refused():
    walker = make_walker()
    with pytest.raises(ValueError, match="shares"):
        take_apart(walker, [*walker.units(), ("inner", walker.blocks[3].up)])


def test_a_resident_plan_leaves_no_hooks_in_the_way():
    walker = make_walker()
    session = attach(walker, SimulatedDevice(1 << 30))
    session.load(session.propose(None))
    with session.one_pass():
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in walker.modules())
        walker(make_input(walker))
    assert session.ring_bytes == 0
