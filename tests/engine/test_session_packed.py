"""Packed weights: what they take, what becomes of those that do not pack, and that nothing of them is left behind."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from layerstream.streaming.engine.forecast import Form
from layerstream.streaming.engine.moving import cut_of
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.plan import Packing
from layerstream.streaming.engine.session import Marks
from layerstream.streaming.engine.simulated import SimulatedDevice

from walkers import ALL_STREAMED, attach, make_input, make_walker, one_pass, plan_for


def test_packed_weights_take_less_page_locked_memory_and_keep_their_homes():
    walker, device = make_walker(), SimulatedDevice(1 << 30, packer=PlainPacker())
    session = attach(walker, device)
    plan = plan_for(session, ALL_STREAMED, is_packed=True)
    session.load(plan)
    assert session.link_bytes <= session.page_locked_bytes <= 1.01 * session.link_bytes
    assert session.page_locked_bytes <= 0.73 * plan.streamed_bytes
    for block in session.parts.blocks:
        for weight in block.weights:
            assert not weight.home.is_meta and weight.current().shape == weight.home.shape


def test_what_cannot_be_packed_travels_raw():
    walker = make_walker(dtype=torch.float32)
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30, packer=PlainPacker()))
    plan = plan_for(session, ALL_STREAMED, is_packed=True)
    session.load(plan)
    assert session.link_bytes == plan.streamed_bytes and not plan.is_packed
    assert torch.equal(one_pass(session, walker, x), expected)


def test_weights_that_pack_badly_are_left_raw_and_known_for_it():
    walker = make_walker()
    for block in walker.blocks:  # every exponent as likely as any other: nothing to save
        for layer in (block.up, block.down):
            bits = torch.randint(-(2**15), 2**15, layer.weight.shape, dtype=torch.int16)
            layer.weight.copy_(bits.view(torch.bfloat16))
    device = SimulatedDevice(1 << 30, packer=PlainPacker())
    session = attach(walker, device)
    plan = plan_for(session, 0.5, is_packed=True)
    session.load(plan)
    assert plan.is_packed and session.link_bytes == plan.streamed_bytes
    again = plan_for(session, 0.5, is_packed=True)
    session.load(again)
    assert session.device_bytes <= again.device_bytes and not again.is_packed


@pytest.mark.parametrize("works", [True, False])
def test_whether_anything_can_be_packed_is_asked_once_a_plan_packs_something(monkeypatch, works):
    asked = []
    packer = PlainPacker()
    monkeypatch.setattr(packer, "works", lambda dtype: asked.append(dtype) or works)
    session = attach(make_walker(), SimulatedDevice(1 << 30, packer=packer))
    budget_bytes = session.total_bytes // 2
    assert not session.propose(budget_bytes).is_packed and not asked, "nothing is known of times yet"
    for _ in range(2):
        assert session.propose(budget_bytes, packing=Packing.ALWAYS).is_packed == works
    assert session.can_pack == works and asked == [torch.bfloat16] * (2 if works else 1)


def test_packed_residents_leave_the_device_with_the_tensors_that_stand_for_them():
    walker, device = make_walker(), SimulatedDevice(1 << 30, packer=PlainPacker())
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, device)
    plan = plan_for(session, 0.5, is_packed=True)
    kept = [index for index, form in enumerate(plan.forms) if form is Form.RESIDENT_PACKED]
    assert kept
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)
    session.end_run()
    assert device.used_bytes == session.resident_bytes
    before, packed_bytes = device.used_bytes, session.packed_resident_bytes
    for index in kept:  # as whoever takes the model over does, without telling
        for weight in session.parts.blocks[index].weights[cut_of(session.parts.blocks[index]) :]:
            weight.put(weight.home)
    gc.collect()
    assert device.used_bytes == before - packed_bytes
    session.forget()


def test_packed_residents_leave_the_device_while_the_error_that_a_run_ended_with_is_looked_at():
    walker, device = make_walker(), SimulatedDevice(1 << 30, packer=PlainPacker())
    x = make_input(walker)
    session = attach(walker, device)
    session.load(plan_for(session, 0.5, is_packed=True))
    assert session.packed_resident_bytes
    one_pass(session, walker, x)
    copy = device.copy

    def fail(*arguments) -> None:
        raise RuntimeError("the link is gone")

    device.copy = fail
    with pytest.raises(RuntimeError, match="the link is gone") as error:
        one_pass(session, walker, x)
    device.copy = copy
    before, resident_bytes = device.used_bytes, session.resident_bytes
    session.unload()  # as ComfyUI does when memory ran out, while it has the traceback
    gc.collect()
    assert device.used_bytes == before - resident_bytes
    assert error.tb is not None


def test_a_model_can_change_between_raw_and_packed():
    walker = make_walker()
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30, packer=PlainPacker()))
    for is_packed in (False, True, True, False):
        session.load(plan_for(session, 0.4, is_packed=is_packed))
        assert torch.equal(one_pass(session, walker, x), expected)


class Calling(torch.nn.Module):
    """A layer that has another one of the model do its part, whose weights are not its own."""

    def __init__(self, layer: torch.nn.Module, other: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._others = (other,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._others[0](self.layer(x))


@pytest.mark.parametrize("is_locked", [True, False], ids=["locked", "unlocked"])
@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5])
def test_a_changed_block_that_runs_inside_another_has_its_changes(kept, is_locked):
    walker = make_walker(count=4)
    walker.blocks[1].down = Calling(walker.blocks[1].down, walker.blocks[2])
    x = make_input(walker)
    device = SimulatedDevice(1 << 30, packer=PlainPacker())
    session = attach(walker, device)
    if not is_locked:
        device.page_lock = lambda memory, is_file: False
    # Room for one restored block at a time.
    plan = replace(plan_for(session, kept, prefetch=1, is_packed=True), scratch_bytes=0)
    assert plan.forms[1].is_packed and plan.forms[2].is_packed
    walker.blocks[2].up.weight.mul_(0.5)
    expected = walker(x)
    walker.blocks[2].up.weight.mul_(2)

    def halve(weight):
        return weight.home * 0.5 if weight.keys[0] == "blocks.2.up.weight" else None

    session.load(plan, marks=Marks((None, None, "halved", None), None), changed=halve)
    for _ in range(3):
        assert torch.equal(one_pass(session, walker, x), expected)
    assert session.meter.total.unplaced > 0


def test_the_next_block_is_restored_beside_compute_and_those_after_it_are_on_their_way():
    walker, device = make_walker(), SimulatedDevice(1 << 30, packer=PlainPacker())
    x = make_input(walker)
    session = attach(walker, device)
    session.load(plan_for(session, ALL_STREAMED, prefetch=1, is_packed=True))
    ahead, streams = [], set()

    def look(index: int) -> None:
        copied, restored = {}, {}
        for place in session.places():
            (restored if place.index in copied else copied)[place.index] = place
        first, second, third = ((index + distance) % 8 for distance in (1, 2, 3))
        ahead.append((restored[first].is_fresh, copied[second].is_held, copied[third].is_held))
        streams.add(restored[first].ready.stream)

    one_pass(session, walker, x)
    for index, block in enumerate(walker.blocks):
        block.norm.register_forward_hook(lambda *_, index=index: look(index))
    one_pass(session, walker, x)
    assert ahead == [(True, True, True)] * 8
    assert len(streams) == 1 and device.compute_stream() not in streams


def test_what_was_restored_from_counts_as_used_though_it_stays():
    walker, device = make_walker(), SimulatedDevice(1 << 30, packer=PlainPacker())
    session = attach(walker, device)
    session.load(plan_for(session, ALL_STREAMED, prefetch=8, is_packed=True))
    session.begin_run()
    copied = session.places()[:8]
    one_pass(session, walker, make_input(walker))
    assert all(place.is_held and not place.is_fresh for place in copied)
