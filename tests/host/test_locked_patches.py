"""What patches hold reaches the card whole by way of two buffers, not written again before they were copied."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from layerstream.streaming.engine import originals
from layerstream.streaming.engine.host_memory import Ceilings, HostMemory
from layerstream.streaming.engine.mapped import FileSlice
from layerstream.streaming.engine.originals import Originals
from layerstream.streaming.host import locked_patches
from layerstream.streaming.host.locked_patches import Ferry

from late_device import LateDevice

FERRY_BYTES = 8192


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(locked_patches, "FERRY_BYTES", FERRY_BYTES)


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, LoRAAdapter):
        return tensors_in(value.weights)
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def patches(chance: random.Random) -> list[tuple]:
    """As `add_patches` keeps them for one weight: a LoRA in bf16, and a difference with some bias in f32."""
    rows, rank = chance.randrange(1, 120), chance.randrange(1, 8)
    turned = torch.randn(30, rank).bfloat16().T  # as some tools save them
    lora = (torch.randn(rows, rank).bfloat16(), turned, 4.0, None, None, None)
    difference = ("diff", (torch.randn(chance.randrange(1, 300)), {"pad_weight": False}))
    return [(0.7, LoRAAdapter({"a"}, lora), 1.0, None, None), (1.0, difference, 1.0, None, None)]


@pytest.mark.parametrize("seed", range(10))
def test_values_arrive_whole_and_what_they_were_stays(seed):
    chance, device, memory = random.Random(seed), LateDevice(), HostMemory()
    ferry, given, found = Ferry(device, memory, Originals(device, memory)), [], []
    for _ in range(60):
        given.append(patches(chance))
        found.append(ferry.on_card(given[-1]))
        assert memory.locked_bytes <= 2 * FERRY_BYTES
    ferry.close()
    assert memory.total_bytes == memory.locked_bytes == 0
    for before, after in zip(given, found, strict=True):
        ours, theirs = tensors_in(before), tensors_in(after)
        assert len(ours) == len(theirs) == 3 and after[0][0] == 0.7 and after[1][1][0] == "diff"
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert {one.data_ptr() for one in ours}.isdisjoint(other.data_ptr() for other in theirs)


def test_what_is_too_large_and_what_holds_nothing_go_their_way_without():
    device, memory = LateDevice(), HostMemory()
    ferry = Ferry(device, memory, Originals(device, memory))
    for value in ([(1.0, ("diff", (torch.zeros(FERRY_BYTES // 4 + 1),)), 1.0)], [(1.0, ("diff", (2.0,)), 1.0)], []):
        assert ferry.on_card(value) is value
    assert memory.total_bytes == device.used_bytes == 0
    ferry.close()


@pytest.fixture
def lora_file(tmp_path, monkeypatch) -> Iterator[Callable[[list[tuple]], list[tuple]]]:
    """Gives patches with their tensors in one file, as newer versions of ComfyUI map them."""
    places: dict[int, FileSlice] = {}
    monkeypatch.setattr(originals, "WORTH_BYTES", 0)
    monkeypatch.setattr(originals, "LEFT_BYTES", 0)
    monkeypatch.setattr(locked_patches, "file_of", lambda tensor: places.get(tensor.data_ptr()))
    with (tmp_path / "lora").open("w+b") as file:

        def put(values: list[tuple]) -> list[tuple]:
            for tensor in tensors_in(values):
                offset = file.seek(0, 2)
                file.write(bytes(tensor.contiguous().view(torch.uint8).numpy()))
                if tensor.is_contiguous():
                    places[tensor.data_ptr()] = FileSlice(file.fileno(), offset, tensor.nbytes, offset)
            file.flush()
            return values

        yield put


@pytest.mark.skipif(sys.platform != "linux", reason="pages of files are locked on Linux only")
def test_what_lies_in_a_file_comes_from_there_and_the_file_is_locked_once(lora_file):
    device, memory, chance = LateDevice(), HostMemory(lambda: most[0]), random.Random(1)
    most, files = [Ceilings(1 << 30, 1 << 30, 1 << 30)], Originals(device, memory)
    given = [[(0.5, ("diff", (torch.randn(chance.randrange(1, 5000)),)), 1.0, None, None)] for _ in range(20)]
    lora_file([value for values in given for value in values])
    for _ in range(2):
        ferry = Ferry(device, memory, files)
        found = [ferry.on_card(values) for values in given]
        device.compute_stream().synchronize()
        for before, after in zip(given, found, strict=True):
            assert torch.equal(before[0][1][1][0], after[0][1][1][0]) and before[0][1][1][0] is not after[0][1][1][0]
        locked_bytes = memory.locked_bytes
        ferry.close()
        assert locked_bytes == memory.locked_bytes == memory.spare_bytes == memory.file_bytes, "no buffers"
    files.keep_only(())
    memory.settle()
    assert memory.total_bytes == 0
    # Without room they go the way of all others.
    most[0] = Ceilings(1 << 30, 1 << 30, 1)
    ferry = Ferry(device, memory, files)
    small = next(values for values in given if values[0][1][1][0].nbytes < FERRY_BYTES)
    after = ferry.on_card(small)
    device.compute_stream().synchronize()
    assert torch.equal(small[0][1][1][0], after[0][1][1][0]) and memory.file_bytes == 0
    ferry.close()


def test_where_files_cannot_be_locked_nothing_is_asked_of_them(lora_file, monkeypatch):
    """On Windows what ComfyUI notes of a file is no number that the system's calls here take."""
    monkeypatch.setattr(originals, "CAN_LOCK", False)
    device, memory = LateDevice(), HostMemory()
    values = lora_file([(0.5, ("diff", (torch.randn(100),)), 1.0, None, None)])
    monkeypatch.setattr(FileSlice, "whole", lambda self: pytest.fail("it was asked"))
    ferry = Ferry(device, memory, Originals(device, memory))
    found = ferry.on_card(values)
    device.compute_stream().synchronize()
    assert torch.equal(tensors_in(values)[0], tensors_in(found)[0])
    ferry.close()


def test_a_value_of_which_a_part_lies_in_no_file_goes_by_buffers(lora_file):
    device, memory = LateDevice(), HostMemory()
    files = Originals(device, memory)
    values = lora_file(patches(random.Random(0)))  # one of its tensors is turned, and so has no place in the file
    ferry = Ferry(device, memory, files)
    found = ferry.on_card(values)
    device.compute_stream().synchronize()
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(values), tensors_in(found), strict=True))
    ferry.close()
