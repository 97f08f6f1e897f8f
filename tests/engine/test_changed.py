"""Weights that are changed as they are loaded: worked out on the device, there under their marks, gone without them."""

from __future__ import annotations

import pytest
import torch
from layerstream.streaming.engine.block import take_apart
from layerstream.streaming.engine.codec import RawCodec
from layerstream.streaming.engine.forecast import Form
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.session import Marks, Session
from layerstream.streaming.engine.simulated import SimulatedDevice

from walkers import ALL_STREAMED, attach, make_input, make_walker, one_pass, plan_for


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
