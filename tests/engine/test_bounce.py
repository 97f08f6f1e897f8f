"""What a file holds reaches the device whole, by way of buffers that are not written again before they were copied."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from layerstream.streaming.engine import bounce
from layerstream.streaming.engine.bounce import Bounce, Turns
from layerstream.streaming.engine.host_memory import HostMemory
from layerstream.streaming.engine.mapped import FileSlice
from layerstream.streaming.engine.originals import Originals
from layerstream.streaming.engine.simulated import SimulatedDevice

from late_device import LateDevice

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no call to read so")

HEADER_BYTES = 77
BUFFER_BYTES = 1000
BUFFERS = 4


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounce, "BUFFER_BYTES", BUFFER_BYTES)
    monkeypatch.setattr(bounce, "BUFFERS", BUFFERS)
    monkeypatch.setattr(bounce, "WORTH_BYTES", 100)


def written(folder: Path, size_bytes: int) -> torch.Tensor:
    """Random bytes, which the file `weights` in `folder` holds behind a header."""
    content = torch.randint(256, (size_bytes,), dtype=torch.uint8)
    (folder / "weights").write_bytes(bytes(HEADER_BYTES) + bytes(content.numpy()))
    return content


@pytest.mark.parametrize("size_bytes", [1, 99, 100, 999, 1000, 1001, 2000, 12_345])
def test_bytes_arrive_whole(small_buffers, tmp_path, size_bytes):
    expected, device, host_memory = written(tmp_path, size_bytes), LateDevice(), HostMemory()
    found = [device.allocate(size_bytes) for _ in range(3)]
    with (tmp_path / "weights").open("rb") as file:
        way = Bounce(device, host_memory, Originals(device, host_memory))
        for destination in found:
            assert way.bring(FileSlice(file.fileno(), HEADER_BYTES, size_bytes, 0), destination)
        way.finish()
    device.compute_stream().synchronize()
    assert all(torch.equal(destination, expected) for destination in found)
    assert host_memory.total_bytes == host_memory.locked_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_bytes_arrive_whole_whatever_was_thought_to_come(small_buffers, tmp_path, seed):
    chance = random.Random(seed)
    expected, device, host_memory = written(tmp_path, 60_000), LateDevice(), HostMemory()
    found = []
    with (tmp_path / "weights").open("rb") as file:
        starts = sorted(chance.sample(range(60_000), 12))
        ends = [*starts[1:], 60_000]
        slices = [FileSlice(file.fileno(), HEADER_BYTES + a, b - a, 0) for a, b in zip(starts, ends, strict=True)]
        way = Bounce(device, host_memory, Originals(device, host_memory))
        for number, asked in enumerate(slices):
            if chance.random() < 0.5:
                way.look_ahead(chance.sample(slices, chance.randrange(6)) if seed % 2 else slices[number:])
            if chance.random() < 0.8:
                found.append((asked, device.allocate(asked.size_bytes)))
                way.bring(*found[-1])
        way.finish()
    device.compute_stream().synchronize()
    for asked, destination in found:
        begin = asked.offset - HEADER_BYTES
        assert torch.equal(destination, expected[begin : begin + asked.size_bytes])
    assert host_memory.total_bytes == host_memory.locked_bytes == 0


def test_what_comes_next_is_read_before_it_is_asked_for(small_buffers, monkeypatch, tmp_path):
    written(tmp_path, 10_000)
    begun = []
    begin_reading = FileSlice.begin_reading

    def noted(self, stored, begin):
        begun.append(self.offset + begin - HEADER_BYTES)
        return begin_reading(self, stored, begin)

    monkeypatch.setattr(FileSlice, "begin_reading", noted)
    device = LateDevice()
    with (tmp_path / "weights").open("rb") as file:
        slices = [FileSlice(file.fileno(), HEADER_BYTES + begin, 2500, 0) for begin in range(0, 10_000, 2500)]
        way = Bounce(device, HostMemory(), Originals(device, HostMemory()))
        way.look_ahead(slices)
        assert begun == [0, 1000, 2000, 2500]
        way.bring(slices[0], device.allocate(2500))
        device.compute_stream().synchronize()
        way.look_ahead(slices[1:])
        assert begun == [0, 1000, 2000, 2500, 3500, 4500, 5000], "what was begun is not begun again"
        way.look_ahead(slices[3:])
        assert begun[7:] == [7500, 8500, 9500], "what is left out makes way"
        way.finish()


def test_no_more_buffers_are_taken_than_allowed_and_none_is_taken_for_little(small_buffers, tmp_path):
    written(tmp_path, 5000)
    device, host_memory = LateDevice(), HostMemory()
    with (tmp_path / "weights").open("rb") as file:
        way = Bounce(device, host_memory, Originals(device, host_memory))
        way.bring(FileSlice(file.fileno(), HEADER_BYTES, 99, 0), device.allocate(99))
        assert host_memory.total_bytes == 0
        way.bring(FileSlice(file.fileno(), HEADER_BYTES, 5000, 0), device.allocate(5000))
        assert host_memory.locked_bytes == BUFFERS * BUFFER_BYTES
        way.finish()
    assert host_memory.locked_bytes == 0


@pytest.mark.parametrize("is_ahead", [False, True], ids=["asked for", "looked ahead"])
def test_a_file_that_became_shorter_is_an_error_after_which_the_buffers_can_be_given_back(
    small_buffers, tmp_path, is_ahead
):
    written(tmp_path, 5000)
    device, host_memory = LateDevice(), HostMemory()
    with (tmp_path / "weights").open("r+b") as file:
        file.truncate(HEADER_BYTES + 3500)
        originals = Originals(device, host_memory)
        way, asked = Bounce(device, host_memory, originals), FileSlice(file.fileno(), HEADER_BYTES, 5000, 0)
        if is_ahead:
            way.look_ahead([asked])
        with pytest.raises(OSError, match="load the model again"):
            way.bring(asked, device.allocate(5000))
        way.finish()
    assert host_memory.total_bytes == 0


def test_where_the_system_cannot_read_so_it_says_so(monkeypatch, tmp_path):
    written(tmp_path, 10)
    monkeypatch.setattr(bounce, "CAN_READ", False)
    monkeypatch.setattr(os, "preadv", None)
    device = LateDevice()
    with (tmp_path / "weights").open("rb") as file:
        assert not Bounce(device, HostMemory(), Originals(device, HostMemory())).bring(
            FileSlice(file.fileno(), HEADER_BYTES, 10, 0), device.allocate(10)
        )


@pytest.mark.parametrize("seed", range(20))
def test_what_is_worked_on_stays_until_the_next_call_whatever_was_thought_to_come(small_buffers, tmp_path, seed):
    chance = random.Random(seed)
    expected, device = written(tmp_path, 60_000), SimulatedDevice(1 << 30, seed)
    with (tmp_path / "weights").open("rb") as file:
        begins, sizes = chance.sample(range(30_000), 30), chance.choices((1, 99, 5_000, 29_999), k=30)
        slices = [
            FileSlice(file.fileno(), HEADER_BYTES + begin, size_bytes, 0)
            for begin, size_bytes in zip(begins, sizes, strict=True)
        ]
        way = Bounce(device, HostMemory(), Originals(device, HostMemory()))
        turns = Turns(device, way)
        for number, asked in enumerate(slices):
            if chance.random() < 0.5:
                coming = chance.sample(slices, chance.randrange(6)) if chance.random() < 0.5 else slices[number:]
                way.look_ahead(coming)
                turns.look_ahead(coming)
            if chance.random() < 0.8:
                found, begin = turns.bring(asked), begins[number]
                assert torch.equal(found, expected[begin : begin + asked.size_bytes])
                assert device.used_bytes <= 2 * 29_999
        turns.finish()
        way.finish()
    del found
    assert device.used_bytes == 0


def test_what_is_worked_on_next_is_under_way_while_compute_is_busy(small_buffers, monkeypatch, tmp_path):
    written(tmp_path, 6000)
    device, begun = LateDevice(), []
    copy = device.copy

    def noted(destination, source, stream, compute):
        begun.append(stream is not compute)
        copy(destination, source, stream, compute)

    monkeypatch.setattr(device, "copy", noted)
    with (tmp_path / "weights").open("rb") as file:
        slices = [FileSlice(file.fileno(), HEADER_BYTES + begin, 1000, 0) for begin in range(0, 6000, 1000)]
        way = Bounce(device, HostMemory(), Originals(device, HostMemory()))
        turns = Turns(device, way)
        turns.look_ahead(slices[:5])
        counts = []
        for asked in slices:
            turns.bring(asked)
            counts.append(len(begun))
        turns.finish()
        way.finish()
    assert counts == [2, 3, 4, 5, 5, 6] and all(begun), "one ahead of what is asked for, and nothing twice"


@pytest.mark.parametrize("seed", range(20))
def test_what_compute_has_still_to_read_is_not_overwritten(small_buffers, tmp_path, seed):
    expected, device = written(tmp_path, 60_000), LateDevice(seed)
    results = []
    with (tmp_path / "weights").open("rb") as file:
        slices = [FileSlice(file.fileno(), HEADER_BYTES + begin, 3000, 0) for begin in range(0, 60_000, 3000)]
        way = Bounce(device, HostMemory(), Originals(device, HostMemory()))
        turns = Turns(device, way)
        for number, asked in enumerate(slices):
            if seed % 2:
                turns.look_ahead(slices[number:])
            found, result = turns.bring(asked), torch.empty(3000, dtype=torch.uint8)
            device.compute_stream().append(lambda result=result, found=found: result.copy_(found))
            results.append(result)
        turns.finish()
        device.compute_stream().synchronize()
        way.finish()
    assert torch.equal(torch.cat(results), expected)


@pytest.mark.parametrize("seed", range(20))
def test_what_came_in_vain_does_not_come_over_what_was_asked_for_after_it(small_buffers, tmp_path, seed):
    expected, device = written(tmp_path, 6000), SimulatedDevice(1 << 30, seed)
    with (tmp_path / "weights").open("rb") as file:
        way = Bounce(device, HostMemory(), Originals(device, HostMemory()))
        turns = Turns(device, way)
        first, vain = (FileSlice(file.fileno(), HEADER_BYTES + begin, 1000, 0) for begin in (0, 1000))
        turns.look_ahead([first, vain])
        turns.bring(first)
        little = [FileSlice(file.fileno(), HEADER_BYTES + begin, 99, 0) for begin in (2000, 3000)]
        turns.look_ahead(little)
        for asked, begin in zip(little, (2000, 3000), strict=True):
            assert torch.equal(turns.bring(asked), expected[begin : begin + 99])
        way.finish()
        turns.finish()
