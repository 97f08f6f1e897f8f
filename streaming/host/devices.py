"""Which engine device serves a ComfyUI device, and why none does."""

from __future__ import annotations

import os
from functools import cache

import torch

from ..engine.device import CudaDevice, Device
from ..engine.packing import PlainPacker
from ..engine.simulated import SimulatedDevice

# GiB of the simulated card; unset, a machine without an accelerator has nothing to stream to.
SIMULATE_VARIABLE = "LAYERSTREAM_SIMULATE_GIB"
SEED_VARIABLE = "LAYERSTREAM_SIMULATE_SEED"
# Set to 1, weights travel packed to the simulated card too, by the plain packer, which is slow.
PACKED_VARIABLE = "LAYERSTREAM_SIMULATE_PACKED"


def device_for(load_device: torch.device) -> Device | None:
    """The engine device for `load_device`; None where there is no memory to stream between."""
    if load_device.type == "cuda":
        return _card(load_device)
    if load_device.type == "cpu" and os.environ.get(SIMULATE_VARIABLE):
        return _simulated_card(
            float(os.environ[SIMULATE_VARIABLE]),
            int(os.environ.get(SEED_VARIABLE, "0")),
            os.environ.get(PACKED_VARIABLE) == "1",
        )
    return None


@cache
def _card(load_device: torch.device) -> Device:
    """One object a card: what bounds it bounds it for all models."""
    return CudaDevice(load_device)


@cache
def _simulated_card(size_gib: float, seed: int, is_packed: bool) -> Device:
    """One card a process: all models share it, as they would share a real one."""
    packer = PlainPacker() if is_packed else None
    return SimulatedDevice(int(size_gib * 1024**3), seed, packer)  # type: ignore[return-value]  # its events meet only its own


def why_not(load_device: torch.device) -> str:
    """The sentence for a person whose models cannot stream."""
    if load_device.type == "cpu":
        return "ComfyUI runs on the CPU, so there is no graphics card to stream to"
    return f"streaming needs a CUDA or ROCm card, and ComfyUI uses `{load_device}`"
