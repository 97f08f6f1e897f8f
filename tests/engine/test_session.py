"""A streamed model gives the bits of the resident one, whatever happens in between, and leaves nothing behind.

The simulated device delays copies at random, poisons what is freed and refuses to exceed its budget, so a result that
is right here has its ordering right.
"""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from layerstream.streaming.engine.block import take_apart
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
