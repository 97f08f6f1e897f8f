"""The slabs that come next are begun while a block is worked on, those that come in any case, and no others."""

from __future__ import annotations

import pytest
import torch
from layerstream.streaming.engine import loader, store
from layerstream.streaming.engine.block import Weight
from layerstream.streaming.engine.forecast import Form
from layerstream.streaming.engine.host_memory import Ceilings, HostMemory
from layerstream.streaming.engine.moving import cut_of
from layerstream.streaming.engine.packing import PlainPacker
from layerstream.streaming.engine.session import Marks
from layerstream.streaming.engine.simulated import SimulatedDevice

from mapped_walker import MappedWalker
from walkers import ALL_STREAMED, Walker, attach, make_input, make_walker, one_pass, plan_for

COUNT = 6


class Broken(Exception):
    """What a patch raises."""


class Load:
    """Loads of a walker that note what of host memory all take as each block's largest weight but one is worked on."""

    def __init__(self, mapped: MappedWalker | None = None, most_bytes: int | None = None) -> None:
        self.host_memory = HostMemory(lambda: Ceilings(total_bytes=most_bytes))
        self.walker: Walker = make_walker(count=COUNT) if mapped is None else mapped.walker
        self.device = SimulatedDevice(1 << 30, packer=PlainPacker())
        if mapped is not None:
            self.session = mapped.attach(device=self.device, host_memory=self.host_memory)
        else:
            self.session = attach(self.walker, self.device, host_memory=self.host_memory)
        self.taken: dict[int, int] = {}
        self.fails_at: str | None = None

    @property
    def sizes(self) -> list[int]:
        """What moves of each block."""
        return [block.bytes_from(cut_of(block)) for block in self.session.parts.blocks]

    def __call__(self, marks: tuple[str | None, ...], kept: float = ALL_STREAMED, is_packed: bool = False) -> None:
        plan = plan_for(self.session, kept, is_packed=is_packed)
        self.taken.clear()

        def is_changed(weight: Weight) -> bool:
            place, index, *_ = weight.keys[0].split(".")
            return place == "blocks" and marks[int(index)] is not None and weight.keys[0].endswith("weight")

        def double(weight: Weight) -> torch.Tensor | None:
            if weight.keys[0].endswith("up.weight"):
                self.taken[int(weight.keys[0].split(".")[1])] = self.host_memory.total_bytes
            if weight.keys[0] == self.fails_at:
                raise Broken
            return weight.home * 2 if is_changed(weight) else None

        self.session.load(plan, marks=Marks(marks, None), changed=double, will_change=is_changed)


@pytest.fixture(autouse=True)
def one_block_ahead(monkeypatch):
    monkeypatch.setattr(loader, "AHEAD_BYTES", 1)


@pytest.mark.parametrize("mark", [None, "doubled"], ids=["as they are", "changed"])
def test_while_a_block_is_worked_on_the_next_slab_is_there_and_no_other(mark):
    load = Load()
    sizes = load.sizes
    load((mark,) * COUNT)
    assert len(set(load.session.plan.forms)) == 1 and load.session.plan.forms[0] is Form.STREAMED
    assert load.taken == {index: sum(sizes[: index + 2]) for index in range(COUNT)}
    assert load.host_memory.total_bytes == load.session.host_bytes == load.session.page_locked_bytes == sum(sizes)
    load((mark,) * COUNT)
    assert load.taken == {}  # all is as it is to be
    load.session.close()
    assert load.host_memory.total_bytes == load.device.locked_bytes == 0


def test_slabs_that_are_there_already_are_not_made_twice():
    load = Load()
    load(("doubled",) * COUNT)
    load(("doubled again",) * COUNT)
    assert set(load.taken.values()) == {sum(load.sizes)}


def test_what_stays_on_the_device_and_what_is_packed_has_none_begun():
    load = Load()
    load(("doubled",) * COUNT, kept=0.5)
    streamed = [index for index, form in enumerate(load.session.plan.forms) if form is Form.STREAMED]
    assert 0 < len(streamed) < COUNT
    assert max(load.taken.values()) == sum(load.sizes[index] for index in streamed) == load.host_memory.total_bytes
    packed = Load()
    packed((None,) * COUNT, is_packed=True)
    assert packed.host_memory.total_bytes == packed.session.host_bytes < sum(packed.sizes)


def test_a_load_that_breaks_off_leaves_nothing_begun():
    load = Load()
    x = make_input(load.walker)
    expected = load.walker(x)
    load.fails_at = "blocks.2.up.weight"
    with pytest.raises(Broken):
        load(("doubled",) * COUNT)
    assert load.taken[2] == sum(load.sizes[:4])
    assert load.host_memory.total_bytes == load.session.host_bytes == sum(load.sizes[:3]) == load.device.locked_bytes
    load.fails_at = None
    load((None,) * COUNT)
    assert torch.equal(one_pass(load.session, load.walker, x), expected)


def test_a_ceiling_that_holds_all_slabs_is_enough():
    load = Load(most_bytes=sum(Load().sizes))
    load(("doubled",) * COUNT)
    assert load.host_memory.total_bytes == load.session.host_bytes == sum(load.sizes)


def test_what_may_lie_in_its_file_is_not_begun(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "WORTH_LOCKING_BYTES", 0)
    begun = []
    begin = store.HostStore.begin

    def note(self, index, *args):
        begun.append(index)
        return begin(self, index, *args)

    monkeypatch.setattr(store.HostStore, "begin", note)
    load = Load(MappedWalker(tmp_path / "weights", count=COUNT, width=96, inner=(512,)))
    marks = tuple("doubled" if index in (1, 4) else None for index in range(COUNT))
    load(marks)
    assert all(load.session._loader.is_on_file(index) == (mark is None) for index, mark in enumerate(marks))
    assert set(begun) == {1, 4}
