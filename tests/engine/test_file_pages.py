"""Weights are copied to the device from the pages that the system keeps of their file, locked where they are."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from layerstream.streaming.engine import bounce, originals, store
from layerstream.streaming.engine.host_memory import Ceilings, HostMemory
from layerstream.streaming.engine.mapped import FileSlice
from layerstream.streaming.engine.originals import Originals
from layerstream.streaming.engine.session import Marks, Session
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.engine.store import FileSlab, HostStore, Stretch

from late_device import LateDevice
from mapped_walker import HEADER_BYTES, MappedWalker
from walkers import ALL_STREAMED, make_input, make_walker, one_pass, plan_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages of files are locked on Linux only")

LARGE = 1 << 40
MATRICES = ("up.weight", "down.weight")


@pytest.fixture(autouse=True)
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of tests are worth what those of models are."""
    monkeypatch.setattr(store, "WORTH_LOCKING_BYTES", 0)
    monkeypatch.setattr(originals, "WORTH_BYTES", 0)
    monkeypatch.setattr(originals, "LEFT_BYTES", 0)
    monkeypatch.setattr(bounce, "WORTH_BYTES", 0)
    monkeypatch.setattr(bounce, "BUFFER_BYTES", 10_000)


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is read from files."""
    sizes: list[int] = []
    read = os.preadv

    def counting(descriptor: int, buffers: list, position: int) -> int:
        sizes.append(read(descriptor, buffers, position))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return sizes


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def on_file(session: Session, memory: HostMemory) -> float:
    """Which share of what streams lies in locked pages of its file."""
    return memory.file_bytes / session.host_bytes


def changed_of(session: Session, factor: float):
    """What `load` is told where the matrices of all blocks are multiplied."""

    def will_change(weight) -> bool:
        return weight.keys[0].endswith(MATRICES) and factor != 1

    def changed(weight) -> torch.Tensor | None:
        if not will_change(weight):
            return None
        on_device = session.home_on_device(weight)
        return (weight.home if on_device is None else on_device) * factor

    marks = Marks((factor,) * 8, None) if factor != 1 else Marks((None,) * 8, None)
    return {"marks": marks, "changed": changed, "will_change": will_change}


def expected_of(x: torch.Tensor, factor: float) -> torch.Tensor:
    walker = make_walker(width=256, inner=(1024,))
    for block in walker.blocks:
        block.up.weight.mul_(factor)
        block.down.weight.mul_(factor)
    return walker(x)


@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5])
def test_what_streams_is_not_read_and_is_in_memory_once(tmp_path, read_bytes, kept):
    model = MappedWalker(tmp_path / "weights")
    x, before, memory = make_input(model.walker), mappings_of(model.path), HostMemory()
    session = model.attach(host_memory=memory)
    session.load(plan_for(session, kept))
    streamed_bytes = session.plan.streamed_bytes
    assert on_file(session, memory) == 1
    assert session.host_bytes == session.page_locked_bytes >= streamed_bytes
    assert sum(read_bytes) <= session.total_bytes - streamed_bytes, "what stays"
    assert torch.equal(one_pass(session, model.walker, x), expected_of(x, 1.0))
    session.close()
    gc.collect()
    assert session.device.locked_bytes == 0 and mappings_of(model.path) == before
    assert torch.equal(model.walker(x), expected_of(x, 1.0)), "the mapping is the home as before"


def test_neighbours_of_a_file_are_one_copy_and_weights_that_lie_apart_several(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(HEADER_BYTES) + bytes(torch.arange(4096, dtype=torch.int32).view(torch.uint8).numpy()))
    with path.open("rb") as file:
        places = [Stretch(begin, model_slice(file, begin + gap, 1024)) for begin, gap in ((0, 0), (1024, 0), (2048, 8))]
        first, second, apart = places
        assert first.file.is_followed_by(second.file, 1024) and not second.file.is_followed_by(apart.file, 1024)
        assert not first.file.is_followed_by(second.file, 2048), "their places in the block have a gap between them"
        whole = first.file.up_to(second.file)
        assert (whole.offset, whole.size_bytes) == (first.file.offset, 2048)
        slab = FileSlab(SimulatedDevice(1 << 20), HostMemory(), 3072, [Stretch(0, whole), apart])
        assert [(begin, stored.nbytes) for begin, stored in slab.pieces] == [(0, 2048), (2048, 1024)]
        found = torch.zeros(3072, dtype=torch.uint8)
        slab.read_into(found)
        for begin, stored in slab.pieces:
            assert torch.equal(stored, found[begin : begin + stored.nbytes])
        assert slab.is_locked
        slab.close()


def model_slice(file, begin: int, size_bytes: int):
    return FileSlice(file.fileno(), HEADER_BYTES + begin, size_bytes, 10**9 + HEADER_BYTES + begin)


def test_of_a_block_each_run_of_weights_is_one_copy(tmp_path):
    class Counting(SimulatedDevice):
        sizes: list[int] = []

        def copy(self, destination, source, stream, compute) -> None:
            self.sizes.append(destination.nbytes)
            super().copy(destination, source, stream, compute)

    model = MappedWalker(tmp_path / "weights", torch.float32, count=2, width=256, inner=(256,))
    session = model.attach(device=Counting(1 << 30))
    session.load(plan_for(session, ALL_STREAMED))
    session.device.sizes.clear()
    one_pass(session, model.walker, make_input(model.walker))
    assert set(session.device.sizes) == {256 * 256 * 4}, "a bias lies between the matrices of a block"


@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5])
def test_weights_that_will_be_changed_in_place_get_slabs_of_their_own(tmp_path, kept):
    """Scheduled LoRAs change what the module holds; a copy of the file's pages would not follow."""
    model, memory = MappedWalker(tmp_path / "weights"), HostMemory()
    x = make_input(model.walker)
    session = model.attach(host_memory=memory)
    plan = plan_for(session, kept)
    session.load(plan)
    assert torch.equal(one_pass(session, model.walker, x), expected_of(x, 1.0)) and on_file(session, memory) == 1
    session.load(plan, all_in_slabs=True)
    assert on_file(session, memory) == 0
    session.discard_fetched()
    for block in model.walker.blocks:
        block.up.weight.data.mul_(2.0)
        block.down.weight.data.mul_(2.0)
    assert torch.equal(one_pass(session, model.walker, x), expected_of(x, 2.0))
    for block in model.walker.blocks:
        block.up.weight.data.mul_(0.5)
        block.down.weight.data.mul_(0.5)
    session.load(plan)
    assert torch.equal(one_pass(session, model.walker, x), expected_of(x, 1.0))


def test_what_lies_scattered_is_gathered_in_a_slab(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "WORTH_LOCKING_BYTES", LARGE)
    model, memory = MappedWalker(tmp_path / "weights"), HostMemory()
    session = model.attach(host_memory=memory)
    session.load(plan_for(session, ALL_STREAMED))
    assert on_file(session, memory) == 0


@pytest.mark.parametrize("allowed", [0, 1, 2, 7, 1000])
def test_where_the_system_refuses_the_bits_are_the_same(tmp_path, allowed):
    """Slabs, where what the first block has in its file was refused; else what was refused is read in every pass."""

    class Refusing(SimulatedDevice):
        left = allowed

        def page_lock(self, memory: torch.Tensor, is_file: bool = False) -> bool:
            self.left -= is_file
            return not (is_file and self.left < 0) and super().page_lock(memory, is_file)

    model, memory = MappedWalker(tmp_path / "weights"), HostMemory()
    x = make_input(model.walker)
    session = model.attach(device=Refusing(1 << 30), host_memory=memory)
    for _ in range(2):
        session.load(plan_for(session, ALL_STREAMED))
        assert torch.equal(one_pass(session, model.walker, x), expected_of(x, 1.0))
        assert on_file(session, memory) == (allowed > 1)
        session.unload()
    session.close()
    assert session.device.locked_bytes == 0


def test_a_ceiling_on_locked_memory_holds_for_pages_of_files(tmp_path):
    model = MappedWalker(tmp_path / "weights")
    most_bytes = model.size_bytes // 2
    memory = HostMemory(lambda: Ceilings(locked_bytes=most_bytes))
    x = make_input(model.walker)
    session = model.attach(host_memory=memory)
    session.load(plan_for(session, ALL_STREAMED))
    assert 0 < memory.file_bytes <= memory.locked_bytes <= most_bytes
    assert 0 < on_file(session, memory) < 1
    assert torch.equal(one_pass(session, model.walker, x), expected_of(x, 1.0))
    session.close()
    assert memory.file_bytes == memory.locked_bytes == memory.total_bytes == 0


def test_a_file_that_became_shorter_is_an_error_and_no_crash(tmp_path):
    model = MappedWalker(tmp_path / "weights")
    session = model.attach()
    with model.path.open("r+b") as file:
        file.truncate(HEADER_BYTES + model.size_bytes // 2)
    with pytest.raises(OSError, match="load the model again"):
        session.load(plan_for(session, ALL_STREAMED))
    assert session.plan is None
    for file in model.slices.values():
        is_whole = file.offset + file.size_bytes <= os.fstat(file.descriptor).st_size
        with nullcontext() if is_whole else pytest.raises(OSError, match="load the model again"):
            file.pages()


def test_a_descriptor_that_cannot_be_mapped_has_weights_copied(tmp_path, monkeypatch):
    model, memory = MappedWalker(tmp_path / "weights"), HostMemory()
    x = make_input(model.walker)
    monkeypatch.setattr("layerstream.streaming.engine.mapped.file_pages", refuse_mapping)
    session = model.attach(host_memory=memory)
    session.load(plan_for(session, ALL_STREAMED))
    assert on_file(session, memory) == 0
    assert torch.equal(one_pass(session, model.walker, x), expected_of(x, 1.0))


def refuse_mapping(*_: object) -> torch.Tensor:
    raise OSError(19, "No such device")


@pytest.mark.parametrize("kept", [ALL_STREAMED, 0.5])
def test_other_changes_read_nothing_again(tmp_path, read_bytes, kept):
    model = MappedWalker(tmp_path / "weights")
    x = make_input(model.walker)
    session = model.attach()
    session.load(plan_for(session, kept), **changed_of(session, 0.5))
    for factor in (2.0, 3.0):
        read_bytes.clear()
        session.load(plan_for(session, kept), **changed_of(session, factor))
        assert sum(read_bytes) < 0.05 * model.size_bytes, "the small weights"
        assert torch.equal(one_pass(session, model.walker, x), expected_of(x, factor))
    assert session.spare_bytes > 0
    session.load(plan_for(session, kept), **changed_of(session, 1.0))
    assert session.spare_bytes == 0, "without changes nothing is brought again"
    assert torch.equal(one_pass(session, model.walker, x), expected_of(x, 1.0))


def test_another_file_under_the_same_number_is_another_one(tmp_path):
    """As when a LoRA makes way for another one of its size, which is opened and mapped where that was."""
    device, memory = SimulatedDevice(1 << 30), HostMemory()
    found, paths = Originals(device, memory), [tmp_path / name for name in "ab"]
    for path, value in zip(paths, (1, 2), strict=True):
        path.write_bytes(bytes([value]) * 5000)
    with paths[0].open("rb") as first, paths[1].open("rb") as second:
        file = FileSlice(first.fileno(), 0, 5000, 1 << 20)
        found.lock([file])
        assert file in found and found.bytes_of(file).unique().tolist() == [1]
        os.dup2(second.fileno(), first.fileno())
        assert file not in found and found.bytes_of(file) is None
        found.lock([file])
        assert found.bytes_of(file).unique().tolist() == [2]
        found.keep_only([file])
        memory.settle()
        assert found.size_bytes == memory.file_bytes == 8192
        found.give_up()


def test_originals_of_a_file_that_cannot_be_mapped_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("layerstream.streaming.engine.mapped.file_pages", refuse_mapping)
    model = MappedWalker(tmp_path / "weights")
    session = model.attach()
    session.load(plan_for(session, ALL_STREAMED), **changed_of(session, 2.0))
    x = make_input(model.walker)
    assert session.spare_bytes == 0 and torch.equal(one_pass(session, model.walker, x), expected_of(x, 2.0))


def test_originals_make_way_for_slabs_and_for_others(tmp_path, monkeypatch):
    model = MappedWalker(tmp_path / "weights")
    device, most_bytes = SimulatedDevice(1 << 30), [LARGE]
    memory = HostMemory(lambda: Ceilings(LARGE, most_bytes[0], most_bytes[0]))
    found = Originals(device, memory)
    files = list(model.slices.values())
    found.lock(files)
    found.finish()
    assert memory.spare_bytes == found.size_bytes == memory.file_bytes >= sum(file.size_bytes for file in files)
    assert memory.room_for_copies() == most_bytes[0], "what makes way is room"
    assert all(torch.equal(found.bytes_of(file)[:2], found.bytes_of(file)[:2]) for file in files)
    most_bytes[0] = memory.total_bytes + 1000
    assert memory.has_room(memory.total_bytes)
    host_store = HostStore(device, memory)
    host_store.build(0, 0, 900)
    assert found.size_bytes > 0, "there was room for both"
    host_store.build(1, 0, 900)
    assert found.size_bytes == memory.file_bytes == 0 and memory.total_bytes == 1800
    found.lock(files)
    assert found.size_bytes <= most_bytes[0] - 1800
    monkeypatch.setattr(originals, "LEFT_BYTES", most_bytes[0])
    found.relieve()
    assert found.size_bytes == 0, "less is free than shall be left to others"
    host_store.close()
    assert device.locked_bytes == memory.total_bytes == 0


@pytest.mark.parametrize("kind", [SimulatedDevice, LateDevice])
@pytest.mark.parametrize("seed", range(20))
def test_what_returns_from_the_device_arrives_whole(kind, seed):
    """Each source is overwritten as soon as compute may have its memory again."""
    device = LateDevice(seed) if kind is LateDevice else SimulatedDevice(1 << 20, seed)
    returns, destinations = bounce.Returns(device), [torch.zeros(500, dtype=torch.uint8) for _ in range(12)]
    places = [device.allocate(500), device.allocate(500)]
    for number, destination in enumerate(destinations):
        place = places[number % 2]
        # As the allocator would: what compute writes now lies where the one before the last was.
        device.compute_stream().append(lambda place=place, number=number: place.fill_(number))
        returns.send(place, destination)
    returns.finish()
    assert [destination.unique().tolist() for destination in destinations] == [[number] for number in range(12)]
