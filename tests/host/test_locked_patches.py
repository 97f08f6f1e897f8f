"""What patches hold reaches the card whole by way of two buffers, not written again before they were copied."""

from __future__ import annotations

import random

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from layerstream.streaming.engine.host_memory import HostMemory
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
    ferry, given, found = Ferry(device, memory), [], []
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
    ferry = Ferry(device, memory)
    for value in ([(1.0, ("diff", (torch.zeros(FERRY_BYTES // 4 + 1),)), 1.0)], [(1.0, ("diff", (2.0,)), 1.0)], []):
        assert ferry.on_card(value) is value
    assert memory.total_bytes == device.used_bytes == 0
    ferry.close()
