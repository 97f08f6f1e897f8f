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
from layerstream.streaming.engine.codec import RawCodec
from layerstream.streaming.engine.forecast import Form
from layerstream.streaming.engine.moving import cut_of
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.session import Marks, Session
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


@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.4])
@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_changed_weights_come_and_go_by_their_marks(kept, is_packed):
    walker = make_walker()
    x = make_input(walker)
    expected = walker(x)
    changed = make_walker()
    for index in (1, 6):
        changed.blocks[index].up.weight.mul_(0.5)
    expected_changed = changed(x)
    session = attach(walker, SimulatedDevice(1 << 30, packer=PlainPacker()))
    plan = plan_for(session, kept, is_packed=is_packed)
    assert is_packed == all(plan.forms[index].is_packed for index in (1, 6))

    def halve(weight):
        touched = weight.keys[0] in ("blocks.1.up.weight", "blocks.6.up.weight")
        return weight.home * 0.5 if touched else None

    marks = Marks(tuple("halved" if i in (1, 6) else None for i in range(8)), None)
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)
    session.load(plan, marks=marks, changed=halve)
    assert torch.equal(one_pass(session, walker, x), expected_changed)
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)
    session.load(plan, marks=marks, changed=halve)
    session.close()
    assert torch.equal(walker(x), expected)


def test_home_tensors_come_to_the_device_to_be_worked_on():
    walker, device = make_walker(), SimulatedDevice(1 << 30)
    session = attach(walker, device)
    session.load(plan_for(session, 0.5))
    for weight in session.parts.blocks[0].weights:
        before = device.used_bytes
        copy = session.home_on_device(weight)
        assert copy is not None and torch.equal(copy, weight.home) and copy.data_ptr() != weight.home.data_ptr()
        assert device.used_bytes > before
        del copy
    converted = Session(take_apart(walker, walker.units(), lambda module, name: torch.float64), device, lambda _: True)
    converted.load(plan_for(converted, 0.5))
    assert {converted.home_on_device(weight) for weight in converted.parts.blocks[0].weights} == {None}
    converted.close()


def test_home_tensors_take_no_more_of_the_device_than_a_run_will():
    walker, device = make_walker(inner=(512, 2048)), SimulatedDevice(1 << 30)
    session = attach(walker, device)
    plan = plan_for(session, 0.5)
    device.budget_bytes = plan.device_bytes

    def halve(weight):
        copy = session.home_on_device(weight)
        return weight.home * 0.5 if copy is None else copy * 0.5

    session.load(plan, marks=Marks(("halved",) * 8, "halved"), changed=halve)
    assert device.peak_bytes() <= plan.device_bytes
    resident = session.propose(1 << 30)
    assert resident.is_resident
    device.budget_bytes = resident.device_bytes
    session.load(resident, marks=Marks(("quartered",) * 8, "quartered"), changed=halve)
    assert session.home_on_device(session.parts.blocks[0].weights[-1]) is None


def half_resident_and_changed():
    """A session, a plan that keeps some blocks, marks that change all, and the names of the large weights that stay."""
    walker = make_walker()
    device = SimulatedDevice(1 << 30)
    session = attach(walker, device)
    plan = plan_for(session, 0.5)
    staying = [f"blocks.{index}." for index, form in enumerate(plan.forms) if form is Form.RESIDENT]
    assert len(staying) > 1
    large = {f"{block}{name}.weight" for block in staying for name in ("up", "down")}
    return device, session, plan, Marks(("halved",) * 8, None), large


def test_residents_have_their_memory_before_what_changed_weights_are_is_worked_out():
    device, session, plan, marks, large = half_resident_and_changed()
    used = []

    def halve(weight):
        if weight.keys[0] in large:
            used.append(device.used_bytes)
        return weight.home * 0.5

    session.load(plan, marks=marks, changed=halve)
    assert len(used) == len(large) and set(used) == {device.used_bytes}
    session.close()


def test_a_load_that_fails_gives_back_what_residents_were_to_have():
    device, session, plan, marks, large = half_resident_and_changed()

    def fail(weight):
        if weight.keys[0] in large:
            raise RuntimeError("no such patch")
        return weight.home

    before = device.used_bytes
    with pytest.raises(RuntimeError, match="no such patch"):
        session.load(plan, marks=marks, changed=fail)
    assert device.used_bytes == before
    session.close()


def test_what_a_failed_load_still_copies_from_the_device_is_not_written_over_the_next_one(monkeypatch):
    walker, device = make_walker(), SimulatedDevice(1 << 30)
    x = make_input(walker)
    expected = walker(x)
    session, compute = attach(walker, device), device.compute_stream()
    late, changes, encode = [], [], RawCodec.encode

    def encode_later(self, weight, stored):
        if any(weight is change for change in changes):  # as from a device
            late.append(lambda: encode(self, weight, stored))
        else:
            encode(self, weight, stored)

    def finish_copies():
        while late:
            late.pop(0)()

    def halve(weight):
        if weight.keys[0] == "blocks.5.up.weight":
            raise torch.OutOfMemoryError("no room to halve it")
        changes.append(weight.home * 0.5)
        return changes[-1]

    monkeypatch.setattr(RawCodec, "encode", encode_later)
    monkeypatch.setattr(compute, "synchronize", finish_copies)
    plan = plan_for(session, ALL_STREAMED)
    with pytest.raises(torch.OutOfMemoryError, match="no room to halve it"):
        session.load(plan, marks=Marks(("halved",) * 8, None), changed=halve)
    assert len(changes) > 5
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)
    session.close()


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
