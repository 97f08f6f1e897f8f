"""Weights mapped from a file reach slab and device with their bits, and their pages are not in memory beside them."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layerstream.streaming.engine import bounce, mapped, originals, store
from layerstream.streaming.engine.mapped import FileSlice
from layerstream.streaming.engine.session import Marks

from mapped_walker import HEADER_BYTES, MappedWalker
from walkers import make_input, make_walker, one_pass, plan_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def resident_bytes(path: Path) -> int:
    """Bytes of this process's memory that are pages mapped from `path`."""
    found, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.fixture(autouse=True)
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system on which pages of files cannot be locked where they are."""
    for module in (originals, store):
        monkeypatch.setattr(module, "CAN_LOCK", False)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows's calls instead of those that it lacks, done by what this system has for them."""

    def unlock(address: ctypes.c_void_p, size: ctypes.c_size_t) -> int:
        assert address.value % mmap.PAGESIZE == size.value % mmap.PAGESIZE == 0
        ctypes.CDLL(None).madvise(address, size, dont_need)
        return 0  # the pages were not locked

    dont_need, kernel = mmap.MADV_DONTNEED, SimpleNamespace(VirtualUnlock=unlock)
    for module in (bounce, mapped):
        monkeypatch.setattr(module, "CAN_READ", False)
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("worth_bytes", [0, bounce.WORTH_BYTES, None], ids=["buffered", "direct", "on Windows"])
def test_a_mapped_model_is_in_memory_once(request, monkeypatch, tmp_path, kept, is_packed, worth_bytes):
    most_share = 0.02
    if worth_bytes is None:
        request.getfixturevalue("windows")
        most_share = 0.15  # the system maps pages around those that are read
    else:
        monkeypatch.setattr(bounce, "WORTH_BYTES", worth_bytes)
    model = MappedWalker(tmp_path / "weights")
    x = make_input(model.walker)
    session = model.attach()
    session.load(plan_for(session, kept, is_packed=is_packed))
    assert resident_bytes(model.path) < most_share * model.size_bytes
    found = one_pass(session, model.walker, x)
    session.close()
    assert torch.equal(model.walker(x), found), "the mapping is the home as before"
    assert resident_bytes(model.path) > 0.9 * model.size_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["changed", "changed and converted"])
def test_weights_that_are_converted_or_changed_leave_no_pages_either(tmp_path, dtype):
    model = MappedWalker(tmp_path / "weights", torch.float32)
    x = make_input(model.walker).to(dtype)
    marks = Marks((None,) * 4 + ("halved",) * 4, None)
    expected = make_walker(width=256, inner=(1024,), dtype=torch.float32)
    for block in expected.blocks[4:]:
        block.up.weight.mul_(0.5)
    expected = expected.to(dtype)
    session = model.attach(dtype)

    def halve(weight):
        return weight.home * 0.5 if weight.keys[0][7] in "4567" and "up.weight" in weight.keys[0] else None

    session.load(plan_for(session, 0.5), marks=marks, changed=halve)
    assert resident_bytes(model.path) < 0.15 * model.size_bytes, "the system maps pages around those that are read"
    assert torch.equal(one_pass(session, model.walker, x), expected(x))


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("worth_bytes", [0, bounce.WORTH_BYTES], ids=["buffered", "direct"])
def test_changes_that_are_worked_out_on_the_device_read_no_page(monkeypatch, tmp_path, worth_bytes, is_packed):
    monkeypatch.setattr(bounce, "WORTH_BYTES", worth_bytes)
    model = MappedWalker(tmp_path / "weights")
    x = make_input(model.walker)
    expected = make_walker(width=256, inner=(1024,))
    for tensor in expected.state_dict().values():
        tensor.mul_(0.5)
    session, touched_bytes = model.attach(), []

    def halve(weight):
        half = session.home_on_device(weight) * 0.5
        touched_bytes.append(resident_bytes(model.path))  # afterwards they are given back
        return half

    plan = plan_for(session, 0.5, is_packed=is_packed)
    session.load(plan, marks=Marks(("halved",) * 8, "halved"), changed=halve)
    assert session.device.peak_bytes() <= plan.device_bytes, "in two places at a time, as large as the ring will be"
    assert max(touched_bytes) < 0.02 * model.size_bytes
    assert resident_bytes(model.path) < 0.02 * model.size_bytes
    assert torch.equal(one_pass(session, model.walker, x), expected(x))


def test_where_files_cannot_be_read_past_their_mapping_home_tensors_come_to_the_device_from_there(windows, tmp_path):
    model = MappedWalker(tmp_path / "weights")
    session = model.attach()
    session.load(plan_for(session, 0.5))
    for weight in session.parts.blocks[0].weights:
        assert torch.equal(session.home_on_device(weight), weight.home)


def test_what_the_system_reads_in_pieces_is_put_together(monkeypatch, tmp_path):
    model, read = MappedWalker(tmp_path / "weights"), os.preadv
    x = make_input(model.walker)
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: read(file, [buffers[0][:50_000]], at))
    session = model.attach()
    session.load(plan_for(session, 0.0))
    found = one_pass(session, model.walker, x)
    session.close()
    assert torch.equal(model.walker(x), found)


def test_a_file_that_became_shorter_is_an_error_and_no_crash(tmp_path):
    model = MappedWalker(tmp_path / "weights")
    session = model.attach()
    with model.path.open("r+b") as file:
        file.truncate(HEADER_BYTES + model.size_bytes // 2)
    with pytest.raises(OSError, match="load the model again"):
        session.load(plan_for(session, 0.0))
    assert session.plan is None


@pytest.mark.parametrize("size_bytes", [0, 1, 999, 1000, 123_456])
def test_readers_share_a_weight(monkeypatch, tmp_path, size_bytes):
    monkeypatch.setattr(mapped, "PIECE_BYTES", 1000)
    path, expected = tmp_path / "weights", torch.randint(256, (size_bytes,), dtype=torch.uint8)
    path.write_bytes(bytes(HEADER_BYTES) + bytes(expected.numpy()))
    with path.open("rb") as file:
        place, stored = FileSlice(file.fileno(), HEADER_BYTES, size_bytes, 0), torch.zeros_like(expected)
        assert place.read_into(stored) and torch.equal(stored, expected)
        if size_bytes:
            os.truncate(path, HEADER_BYTES + size_bytes - 1)
            with pytest.raises(OSError, match=f"ends at byte {HEADER_BYTES + size_bytes - 1} and 1 more"):
                place.read_into(stored)


def test_no_reader_goes_on_writing_after_another_failed(monkeypatch, tmp_path):
    (tmp_path / "weights").write_bytes(bytes(3000))
    read = os.preadv

    def read_or_fail(descriptor: int, buffers: list, position: int) -> int:
        if position == 0:
            raise OSError("the disk is broken")
        time.sleep(0.1)
        return read(descriptor, buffers, position)

    monkeypatch.setattr(mapped, "PIECE_BYTES", 1000)
    monkeypatch.setattr(os, "preadv", read_or_fail)
    stored = torch.ones(3000, dtype=torch.uint8)
    with (tmp_path / "weights").open("rb") as file:
        with pytest.raises(OSError, match="the disk is broken"):
            FileSlice(file.fileno(), 0, 3000, 0).read_into(stored)
        before = stored.clone()
        time.sleep(0.3)
    assert torch.equal(stored, before)


def test_reading_ahead_reads_nothing_more(monkeypatch, tmp_path):
    monkeypatch.setattr(bounce, "WORTH_BYTES", 0)
    read, counted = os.preadv, []

    def counting(descriptor: int, buffers: list, position: int) -> int:
        counted.append(read(descriptor, buffers, position))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", counting)
    kinds = [(0.0, False), (0.0, True), (0.5, True), (1.0, True), (0.5, False), (0.5, True), (0.0, True), (1.0, False)]

    def read_bytes(name: str) -> list[int]:
        model, found = MappedWalker(tmp_path / name), []
        session = model.attach()
        for mark in (None, "doubled", "tripled"):
            factor = {None: 1, "doubled": 2, "tripled": 3}[mark]
            marks = Marks((None,) * 4 + (mark,) * 4, None)

            def will_change(weight, factor=factor):
                return factor > 1 and weight.keys[0][7] in "4567" and "up.weight" in weight.keys[0]

            def changed(weight, factor=factor, will_change=will_change):
                home = session.home_on_device(weight) if will_change(weight) else None
                return None if home is None else home * factor

            for kept, is_packed in kinds:
                counted.clear()
                plan = plan_for(session, kept, is_packed=is_packed)
                session.load(plan, marks=marks, changed=changed, will_change=will_change)
                found.append(sum(counted))
        return found

    ahead = read_bytes("ahead")
    monkeypatch.setattr(bounce.Bounce, "look_ahead", lambda *_: None)
    monkeypatch.setattr(bounce.Turns, "look_ahead", lambda *_: None)
    assert ahead == read_bytes("not ahead") and min(ahead) < 0.01 * max(ahead)
