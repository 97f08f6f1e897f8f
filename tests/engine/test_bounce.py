"""What a file holds reaches the device whole, by way of buffers that are not written again before they were copied."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from layerstream.streaming.engine import bounce
from layerstream.streaming.engine.bounce import Bounce
from layerstream.streaming.engine.mapped import FileSlice
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.engine.store import HostMemory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no call to read so")

HEADER_BYTES = 77
BUFFER_BYTES = 1000


class LateDevice(SimulatedDevice):
    """Its copies run as late as they may, compute's own too."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self._late = self.copy_stream()

    def compute_stream(self):
        return self._late


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounce, "BUFFER_BYTES", BUFFER_BYTES)
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
        way = Bounce(device, host_memory)
        for destination in found:
            assert way.bring(FileSlice(file.fileno(), HEADER_BYTES, size_bytes, 0), destination)
        way.finish()
    device.compute_stream().synchronize()
    assert all(torch.equal(destination, expected) for destination in found)
    assert host_memory.total_bytes == host_memory.locked_bytes == 0


def test_two_buffers_are_enough_and_none_is_taken_for_little(small_buffers, tmp_path):
    written(tmp_path, 5000)
    device, host_memory = LateDevice(), HostMemory()
    with (tmp_path / "weights").open("rb") as file:
        way = Bounce(device, host_memory)
        way.bring(FileSlice(file.fileno(), HEADER_BYTES, 99, 0), device.allocate(99))
        assert host_memory.total_bytes == 0
        way.bring(FileSlice(file.fileno(), HEADER_BYTES, 5000, 0), device.allocate(5000))
        assert host_memory.locked_bytes == 2 * BUFFER_BYTES
        way.finish()
    assert host_memory.locked_bytes == 0


def test_a_file_that_became_shorter_is_an_error_after_which_the_buffers_can_be_given_back(small_buffers, tmp_path):
    written(tmp_path, 5000)
    device, host_memory = LateDevice(), HostMemory()
    with (tmp_path / "weights").open("r+b") as file:
        file.truncate(HEADER_BYTES + 3500)
        way = Bounce(device, host_memory)
        with pytest.raises(OSError, match="load the model again"):
            way.bring(FileSlice(file.fileno(), HEADER_BYTES, 5000, 0), device.allocate(5000))
        way.finish()
    assert host_memory.total_bytes == 0


def test_where_the_system_cannot_read_so_it_says_so(monkeypatch, tmp_path):
    written(tmp_path, 10)
    monkeypatch.setattr(bounce, "CAN_READ", False)
    monkeypatch.setattr(os, "preadv", None)
    device = LateDevice()
    with (tmp_path / "weights").open("rb") as file:
        assert not Bounce(device, HostMemory()).bring(
            FileSlice(file.fileno(), HEADER_BYTES, 10, 0), device.allocate(10)
        )
