"""A device short of memory while a model is loaded: no holes between what stays, and what it refused is asked again."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from layerstream.streaming.engine import bounce
from layerstream.streaming.engine.block import Weight
from layerstream.streaming.engine.forecast import Form
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.session import Marks, Session
from layerstream.streaming.engine.simulated import SimulatedDevice

from mapped_walker import MappedWalker
from refusing_device import RefusingDevice
from walkers import Walker, attach, make_input, make_walker, one_pass, plan_for


class ArenaDevice(SimulatedDevice):
    """Gives the first gap that is large enough, in one arena, so that what lies in the way counts."""

    def __init__(self) -> None:
        super().__init__(1 << 26, packer=PlainPacker())
        self.taken: dict[int, int] = {}

    def allocate(self, size_bytes: int) -> torch.Tensor:
        place = 0
        for begin, taken_bytes in sorted(self.taken.items()):
            if begin - place >= size_bytes:
                break
            place = begin + taken_bytes
        memory = super().allocate(size_bytes)
        if size_bytes:
            self.taken[place] = size_bytes
            weakref.finalize(memory.untyped_storage(), self.taken.pop, place)
        return memory

    @property
    def hole_bytes(self) -> int:
        """Bytes of the gaps before what is taken last."""
        return max((begin + size for begin, size in self.taken.items()), default=0) - sum(self.taken.values())


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_what_is_worked_on_leaves_no_holes_between_what_stays(is_packed):
    walker, device = make_walker(), ArenaDevice()
    session = attach(walker, device)
    plan = plan_for(session, 0.6, is_packed=is_packed)
    kept = [form for form in plan.forms if not form.is_streamed]
    assert len(kept) >= 3 and set(kept) == {Form.RESIDENT_PACKED if is_packed else Form.RESIDENT}

    def work(weight):
        room = device.allocate(3 * weight.codec.stored_bytes)  # as patches are worked out: in a wider dtype
        return (room[: weight.codec.stored_bytes].view(weight.home.dtype).view_as(weight.home)).copy_(weight.home * 2)

    for name in ("first", "again"):
        session.load(plan, marks=Marks((name,) * 8, name), changed=work)
        assert device.hole_bytes == 0, f"{name}: {sorted(device.taken.items())}"
        assert device.used_bytes == session.resident_bytes == sum(device.taken.values())
    session.close()
    assert device.used_bytes == 0


def make_doubled(**sizes) -> Walker:
    """The walker with what `will_change` names twice as large."""
    walker = make_walker(**sizes)
    for block in walker.blocks:
        block.down.weight.mul_(2)
    return walker


def will_change(weight: Weight) -> bool:
    return weight.keys[0].endswith("down.weight")


def double(weight: Weight, session: Session, before_result: Callable[[], object] = lambda: None) -> torch.Tensor:
    """Work out twice `weight` on the device, in memory that is asked for after `before_result`."""
    on_device = session.home_on_device(weight)
    before_result()
    room = session.device.allocate(weight.codec.stored_bytes).view(weight.home.dtype).view_as(weight.home)
    return torch.mul(weight.home if on_device is None else on_device, 2, out=room)


@pytest.mark.parametrize("is_mapped", [False, True], ids=["loaded", "mapped"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
def test_what_a_device_refuses_once_while_loading_is_asked_for_again(monkeypatch, tmp_path, is_packed, is_mapped):
    """Mapped, while what comes next is being read and is on its way."""
    monkeypatch.setattr(bounce, "WORTH_BYTES", 0)
    doubled = make_doubled()
    x = make_input(doubled)
    expected, refused = doubled(x), 0
    sizes = {"width": doubled.width, "inner": (512,)}
    for left in range(30):
        device = RefusingDevice(1 << 26, packer=PlainPacker())
        if is_mapped:
            model = MappedWalker(tmp_path / str(left), **sizes)
            walker, session = model.walker, model.attach(device=device)
        else:
            walker = make_walker()
            session = attach(walker, device)
        plan = plan_for(session, 0.5, is_packed=is_packed)
        device.left = left

        def work(weight, device=device, session=session):
            if not will_change(weight):
                return None
            device.is_counting = True  # what is taken before the first block has nothing that could make way
            return double(weight, session)

        session.load(plan, marks=Marks(("doubled",) * 8, None), changed=work, will_change=will_change)
        device.is_counting = False
        refused += device.left < 0
        assert torch.equal(one_pass(session, walker, x), expected), f"after refusal {left}"
        session.end_run()
        assert device.used_bytes == session.resident_bytes
        session.close()
    assert refused >= 10, "there were as many allocations to refuse"


def test_what_only_loading_takes_is_given_back_before(tmp_path):
    """The place in which the next weight comes is room enough for what was refused."""
    doubled = make_doubled(width=256, inner=(1024,))
    x = make_input(doubled)
    expected = doubled(x)
    model, device = MappedWalker(tmp_path / "weights"), SimulatedDevice(1 << 26)
    session, calls = model.attach(device=device), []

    def take_the_rest():
        if len(calls) == 3:
            device.budget_bytes = device.used_bytes  # someone else has it

    def work(weight):
        if not will_change(weight):
            return None
        calls.append(weight.keys[0])
        return double(weight, session, take_the_rest)

    session.load(plan_for(session, 0.0), marks=Marks(("doubled",) * 8, None), changed=work, will_change=will_change)
    assert calls[2] == calls[3], "it was not refused"
    device.budget_bytes = 1 << 26
    assert torch.equal(one_pass(session, model.walker, x), expected)
    session.close()


def test_what_a_device_always_refuses_is_an_error():
    walker, device = make_walker(), SimulatedDevice(1 << 26)
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, device)
    plan = plan_for(session, 0.5)

    def refuse(weight):
        if will_change(weight):  # not what lies outside the blocks, for which nothing is tried twice
            raise torch.OutOfMemoryError("no room for patches")

    with pytest.raises(torch.OutOfMemoryError, match="no room for patches"):
        session.load(plan, marks=Marks(("doubled",) * 8, None), changed=refuse)
    assert session.plan is None and device.used_bytes == 0
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)
    session.close()
