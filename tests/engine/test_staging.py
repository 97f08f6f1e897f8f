"""Weights that are not in locked memory, but in their file or in ordinary memory, reach the device with their bits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layerstream.streaming.engine.block import take_apart
from layerstream.streaming.engine.forecast import Form
from layerstream.streaming.engine.host_memory import Ceilings, HostMemory
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.session import Marks, Session
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.engine.staging import Staging
from layerstream.streaming.engine.store import Slab

from walkers import ALL_STREAMED, make_input, make_walker, one_pass, plan_for

COUNT = 24


def bounded(most_bytes: int | None) -> HostMemory:
    return HostMemory(lambda: Ceilings(copies_bytes=most_bytes))


def attach(walker, device, room: float | None, is_mapped=lambda tensor: True) -> Session:
    """A session whose slabs may take the share `room` of the model; None for no bound."""
    parts = take_apart(walker, walker.units())
    most_bytes = None if room is None else int(room * sum(block.weight_bytes() for block in parts.blocks))
    return Session(parts, device, is_mapped, host_memory=bounded(most_bytes))


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5])
@pytest.mark.parametrize("room", [0.0, 0.25])
@pytest.mark.parametrize("inner", [(512,), (1024, 512, 640)], ids=["even", "uneven"])
def test_every_pass_equals_the_resident_one(inner, room, kept, is_packed):
    walker = make_walker(count=COUNT // 2 if is_packed else COUNT, inner=inner)
    for seed, batch in itertools.product(range(3), (1, 2)):
        x = make_input(walker, batch)
        expected = walker(x)
        device = SimulatedDevice(1 << 30, seed, PlainPacker())
        session = attach(walker, device, room)
        session.load(plan_for(session, kept, is_packed=is_packed))
        assert 0 < session.in_file_bytes <= session.link_bytes
        assert session.host_bytes <= room * session.total_bytes
        for _ in range(4):
            assert torch.equal(one_pass(session, walker, x), expected)
        assert session.meter.total.unplaced == session.meter.total.departures == 0
        session.close()
        assert torch.equal(walker(x), expected) and device.locked_bytes == 0


def test_with_room_nothing_stays_in_the_file():
    session = attach(make_walker(count=COUNT), SimulatedDevice(1 << 30), 1.01)
    session.load(plan_for(session, ALL_STREAMED))
    assert session.in_file_bytes == 0 and session.host_bytes == session.plan.streamed_bytes


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_slabs_that_cannot_be_locked_come_by_buffers_that_can(is_packed):
    walker = make_walker(count=COUNT // 2 if is_packed else COUNT)
    device, x = SimulatedDevice(1 << 30, 5, PlainPacker()), make_input(walker)
    expected = walker(x)
    memory = HostMemory(lambda: Ceilings(locked_bytes=sum(tensor.nbytes for tensor in walker.parameters()) // 3))
    session = Session(take_apart(walker, walker.units()), device, lambda tensor: False, host_memory=memory)
    session.load(plan_for(session, ALL_STREAMED, is_packed=is_packed))
    assert 0 < session.page_locked_bytes < session.host_bytes and session.in_file_bytes == 0
    copied, copy = [], device.copy
    device.copy = lambda to, source, *streams: (copied.append(source.data_ptr()), copy(to, source, *streams))
    for _ in range(3):
        assert torch.equal(one_pass(session, walker, x), expected)
        locked = [(start, start + size) for start, size in device._locked.items()]
        assert all(any(start <= address < end for start, end in locked) for address in copied)
    walker.order = [*range(4, -1, -1)]
    assert torch.equal(one_pass(session, walker, x), walker(x))


def test_what_is_not_mapped_has_its_slabs_whatever_the_room():
    walker = make_walker(count=COUNT)
    last = {tensor.data_ptr() for block in walker.blocks[COUNT // 2 :] for tensor in block.state_dict().values()}
    session = attach(walker, SimulatedDevice(1 << 30), 0.0, lambda tensor: tensor.data_ptr() in last)
    session.load(plan_for(session, ALL_STREAMED))
    assert session.in_file_bytes == session.host_bytes == session.plan.streamed_bytes // 2


@pytest.mark.parametrize("is_shelved", [False, True], ids=["gone", "shelved"])
@pytest.mark.parametrize("room", [0.0, 0.3, 0.8, 1.2])
def test_room_is_never_exceeded_while_plans_change(room, is_shelved):
    walker, device, peaks = make_walker(count=COUNT), SimulatedDevice(1 << 30, 7), [0]
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, device, room)
    memory = session._loader.store.host_memory
    take = memory.take

    def take_and_look(*args):
        locking = take(*args)
        peaks.append(memory.total_bytes)
        return locking

    memory.take = take_and_look
    if is_shelved:
        session.shelve()
    all_streamed, half, most = (plan_for(session, kept) for kept in (ALL_STREAMED, 0.5, 0.8))
    for plan in (half, all_streamed, half, most, half, half):
        peaks.clear()
        session.load(plan)
        assert max(peaks, default=0) <= room * session.total_bytes
        assert torch.equal(one_pass(session, walker, x), expected)
        session.evict(session.total_bytes // 4)
    streamed_share = half.streamed_bytes / session.total_bytes
    assert (session.in_file_bytes > 0) == (room < streamed_share)
    assert (session.host_bytes > half.streamed_bytes) == (is_shelved and room > streamed_share)
    session.close()
    assert torch.equal(walker(x), expected)


@pytest.mark.parametrize("room, is_all_packed", [(0.4, True), (0.5, True), (0.68, True), (0.85, False), (0.9, False)])
def test_what_packs_worse_than_was_thought_stays_within_a_ceiling(room, is_all_packed):
    walker = make_walker(count=COUNT)
    generator = torch.Generator().manual_seed(0)
    for block in walker.blocks:
        for linear in (block.up, block.down):
            shape = linear.weight.shape
            linear.weight.mul_(torch.exp2(torch.randint(-12, 1, shape, generator=generator).float()))
    x = make_input(walker)
    expected = walker(x)
    parts = take_apart(walker, walker.units())
    most_bytes = int(room * sum(block.weight_bytes() for block in parts.blocks))
    memory = HostMemory(lambda: Ceilings(most_bytes, most_bytes, most_bytes))
    session = Session(parts, SimulatedDevice(1 << 30, 2, PlainPacker()), lambda tensor: True, host_memory=memory)
    for _ in range(3):
        plan = plan_for(session, ALL_STREAMED, is_packed=True)
        if not is_all_packed:
            forms = (Form.STREAMED, Form.STREAMED_PACKED) * (COUNT // 2)
            plan = replace(plan_for(session, ALL_STREAMED), forms=forms)
        session.load(plan)
        assert 0.5 * most_bytes < session.host_bytes <= most_bytes
        assert torch.equal(one_pass(session, walker, x), expected)


def test_changed_weights_have_slabs_and_weights_to_be_changed_in_place_too():
    walker = make_walker(count=COUNT)
    x = make_input(walker)
    session = attach(walker, SimulatedDevice(1 << 30), 0.0)
    marks = Marks(("halved",) + (None,) * (COUNT - 1), None)
    changed = make_walker(count=COUNT)
    for parameter in changed.blocks[0].parameters():
        parameter.mul_(0.5)

    def halve(weight):
        return weight.home * 0.5 if weight.keys[0].startswith("blocks.0.") and not weight.sites[0].is_buffer else None

    session.load(plan_for(session, ALL_STREAMED), marks=marks, changed=halve)
    assert session.in_file_bytes < session.link_bytes and session.host_bytes == session.changed_bytes > 0
    assert torch.equal(one_pass(session, walker, x), changed(x))
    session.load(session.plan, all_in_slabs=True)
    assert session.in_file_bytes == 0 and torch.equal(one_pass(session, walker, x), make_walker(count=COUNT)(x))
    session.load(session.plan)
    assert session.host_bytes == 0 and torch.equal(one_pass(session, walker, x), make_walker(count=COUNT)(x))


def test_blocks_that_run_in_another_order_or_not_at_all():
    walker = make_walker(count=COUNT)
    x = make_input(walker)
    session = attach(walker, SimulatedDevice(1 << 30, seed=3), 0.3)
    session.load(plan_for(session, 0.2))
    one_pass(session, walker, x)
    for order in (range(COUNT - 1, -1, -1), range(0, COUNT, 3), (5, 5, 2, 9, 5), range(COUNT)):
        walker.order = list(order)
        for _ in range(3):
            assert torch.equal(one_pass(session, walker, x), walker(x))


def reads_that_fail(session: Session, fails: Callable[[str], bool]) -> threading.Event:
    """While what this gives is set, weights of such names cannot be read."""
    failing, store = threading.Event(), session._loader._store

    def fail_or_store(weight, *args):
        if failing.is_set() and fails(weight.keys[0]):
            raise OSError("the file is gone")
        store(weight, *args)

    session._loader._store = fail_or_store
    return failing


def test_a_read_that_fails_ends_the_pass_and_the_next_one_is_whole():
    walker = make_walker(count=COUNT)
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30), 0.0)
    session.load(plan_for(session, ALL_STREAMED))
    failing = reads_that_fail(session, lambda name: name.startswith("blocks.7."))
    assert torch.equal(one_pass(session, walker, x), expected)
    for _ in range(2):
        failing.set()
        with pytest.raises(OSError, match="the file is gone"):
            for _ in range(3):  # what was read before is not read again
                one_pass(session, walker, x)
        failing.clear()
        for _ in range(2):
            assert torch.equal(one_pass(session, walker, x), expected)


def test_reads_that_fail_together_end_one_pass_only():
    walker = make_walker(count=COUNT)
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30), 0.0)
    session.load(plan_for(session, ALL_STREAMED))
    failing = reads_that_fail(session, lambda name: not name.startswith("blocks.0."))
    failing.set()
    with pytest.raises(OSError, match="the file is gone"):
        one_pass(session, walker, x)
    session._pipeline._staging._reader.submit(int).result()  # what was to be read ahead has been, or has failed
    failing.clear()
    for _ in range(2):
        assert torch.equal(one_pass(session, walker, x), expected)


def test_sessions_that_come_and_go_leave_no_thread_and_no_locked_memory():
    walker = make_walker(count=COUNT)
    x, device = make_input(walker), SimulatedDevice(1 << 30)
    memory, expected = bounded(0), walker(x)
    Slab(device, memory, 0, 1).close()  # host memory has a thread of its own for as long as it lasts
    before = threading.enumerate()
    parts, pipelines = take_apart(walker, walker.units()), []

    def break_off(*_):
        raise InterruptedError

    def started() -> int:
        return len(set(threading.enumerate()) - set(before))

    for cycle in range(50):
        session = Session(parts, device, lambda tensor: True, host_memory=memory)
        session.load(plan_for(session, ALL_STREAMED))
        hook = walker.blocks[cycle % COUNT].register_forward_hook(break_off)
        with pytest.raises(InterruptedError):
            one_pass(session, walker, x)
        hook.remove()
        if cycle % 2:
            assert torch.equal(one_pass(session, walker, x), expected)
        assert started() == 1
        pipelines.append(session._pipeline)  # so that it is closed, and does not just die
        session.unload()
        session.close()
        session.close()
        assert started() == 0
        assert memory.total_bytes == memory.locked_bytes == device.locked_bytes == 0


def test_what_changes_on_the_host_is_read_again():
    walker = make_walker(count=COUNT)
    x = make_input(walker)
    session = Session(
        take_apart(walker, walker.units()),
        SimulatedDevice(1 << 30),
        lambda tensor: False,
        host_memory=HostMemory(lambda: Ceilings(locked_bytes=0)),
    )
    session.load(plan_for(session, ALL_STREAMED))
    for _ in range(3):
        one_pass(session, walker, x)
    for block in walker.blocks:
        block.up.weight.mul_(0.5)
    session.discard_fetched()
    expected = make_walker(count=COUNT)
    for block in expected.blocks:
        block.up.weight.mul_(0.5)
    assert torch.equal(one_pass(session, walker, x), expected(x))


def test_nothing_is_read_ahead_that_is_on_the_device_already(monkeypatch):
    walker = make_walker(count=COUNT)
    x = make_input(walker)
    look_ahead, again = Staging.look_ahead, []

    def noted(staging, indices):
        indices = list(indices)
        again.extend(place.index for place in session.places() if place.is_fresh and place.index in indices)
        look_ahead(staging, indices)

    monkeypatch.setattr(Staging, "look_ahead", noted)
    session = Session(
        take_apart(walker, walker.units()),
        SimulatedDevice(1 << 30, 5, PlainPacker()),
        lambda tensor: False,
        host_memory=HostMemory(lambda: Ceilings(locked_bytes=0)),
    )
    session.load(plan_for(session, ALL_STREAMED, is_packed=True))
    for _ in range(3):
        one_pass(session, walker, x)
    assert not again


def test_a_ring_that_does_not_fit_leaves_no_buffers_locked():
    walker = make_walker(count=COUNT)
    device = SimulatedDevice(1 << 30)
    session = attach(walker, device, 0.0)
    session.load(plan_for(session, ALL_STREAMED))
    device.limit(device.used_bytes)
    with pytest.raises(torch.OutOfMemoryError) as error:
        session.begin_run()
    assert device.locked_bytes == 0, f"held while {error.type.__name__} is handled"
    device.limit(None)
    assert torch.equal(one_pass(session, walker, make_input(walker)), make_walker(count=COUNT)(make_input(walker)))
