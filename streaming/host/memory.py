"""Where the card's memory goes, and the host's.

In: counters that the engine, ComfyUI and torch's allocator keep anyway. Out: figures that add up to the whole card.
Nothing here waits for the device: the driver is asked how much is free and nothing else, at most once a second, since
on some systems that takes as long as a small step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.model_management
import psutil
import torch

from ..engine.simulated import SimulatedDevice
from .budget import available_ram_bytes
from .devices import device_for
from .files import is_mapped
from .streams import ModelStream

ASK_DRIVER_EVERY_S = 1.0


class CardMemory(NamedTuple):
    """Bytes of one card. All but the first two and the last are parts of the whole and add up to `total_bytes`."""

    name: str
    total_bytes: int
    resident_bytes: int
    """Weights of streamed models that stay."""
    ring_bytes: int
    """What weights pass through, as copied and as restored."""
    activation_bytes: int
    """What else this process holds for compute; not known on a simulated card, where it is 0."""
    other_model_bytes: int
    """Models that ComfyUI loaded unstreamed."""
    other_program_bytes: int
    """Other programs, the driver included."""
    free_bytes: int
    """What can be taken, what torch holds unused included."""
    budget_bytes: int | None
    """What the streamed models on the card may take with their rings; None where none is there."""


class Card:
    """The card that ComfyUI uses, looked at from outside."""

    def __init__(self) -> None:
        self._torch_device = comfy.model_management.get_torch_device()
        self._device = device_for(self._torch_device)
        self._asked_s = float("-inf")
        self._free_by_driver, self._total = 0, 0

    def memory(self, streams: Sequence[tuple[ModelStream, int]]) -> CardMemory | None:
        """What holds the card now, by `streams` and their resident bytes; None where there is no card."""
        if self._device is None:
            return None
        loaded = [(stream, resident) for stream, resident in streams if stream.is_in_place]
        resident_bytes = sum(resident for _, resident in loaded)
        ring_bytes = sum(stream.session.ring_bytes for stream, _ in loaded)
        budget_bytes = sum(stream.budget_bytes for stream, _ in loaded) if loaded else None
        if isinstance(self._device, SimulatedDevice):
            total, name = self._device.budget_bytes, "simulated"
            activation_bytes = other_model_bytes = other_program_bytes = 0
        else:
            name = torch.cuda.get_device_name(self._torch_device)
            total, activation_bytes, other_model_bytes, other_program_bytes = self._others(resident_bytes + ring_bytes)
        held = resident_bytes + ring_bytes + activation_bytes + other_model_bytes + other_program_bytes
        return CardMemory(
            name,
            total,
            resident_bytes,
            ring_bytes,
            activation_bytes,
            other_model_bytes,
            other_program_bytes,
            max(0, total - held),
            budget_bytes,
        )

    def _others(self, ours_bytes: int) -> tuple[int, int, int, int]:
        """The whole card, and what of it others than the streamed models have: compute, models, programs."""
        now = time.monotonic()
        if now - self._asked_s >= ASK_DRIVER_EVERY_S:
            self._asked_s = now
            self._free_by_driver, self._total = torch.cuda.mem_get_info(self._torch_device)
        reserved = torch.cuda.memory_reserved(self._torch_device)
        allocated = torch.cuda.memory_allocated(self._torch_device)
        plain_bytes = apart_bytes = 0
        for patcher in unstreamed_models():
            if patcher.load_device != self._torch_device:
                continue
            if getattr(patcher, "is_dynamic", lambda: False)():
                apart_bytes += patcher.loaded_size()  # DynamicVRAM takes its memory past torch's allocator
            else:
                plain_bytes += patcher.loaded_size()
        activation_bytes = max(0, allocated - ours_bytes - plain_bytes)
        other_program_bytes = max(0, self._total - self._free_by_driver - reserved - apart_bytes)
        return self._total, activation_bytes, plain_bytes + apart_bytes, other_program_bytes


def loaded_patchers() -> list[Any]:
    """The patchers of all models that ComfyUI counts as loaded, in a list of its own."""
    patchers = [loaded.model for loaded in tuple(comfy.model_management.current_loaded_models)]
    return [patcher for patcher in patchers if patcher is not None]


def unstreamed_models() -> list[Any]:
    """The loaded patchers whose weights are not placed by a stream."""
    return [patcher for patcher in loaded_patchers() if not is_streamed(patcher)]


def is_streamed(patcher: Any) -> bool:
    """True for a patcher of ours while its model holds our tensors."""
    stream = getattr(patcher, "stream", None)
    return isinstance(stream, ModelStream) and stream.is_in_place


class RamUse(NamedTuple):
    """Bytes of RAM: all and free, and of them the slabs of streamed models, and those the device can read directly."""

    ram_total_bytes: int
    ram_free_bytes: int
    slab_bytes: int
    page_locked_bytes: int


def ram_use(streams: Sequence[ModelStream]) -> RamUse:
    """What streaming holds of RAM."""
    sessions = [stream.session for stream in streams]
    spare_bytes = sum(stream.spare_bytes for stream in streams)
    return RamUse(
        psutil.virtual_memory().total,
        available_ram_bytes(),
        sum(session.host_bytes for session in sessions) + spare_bytes,
        sum(session.page_locked_bytes for session in sessions) + spare_bytes,
    )


def mapped_bytes(stream: ModelStream) -> int:
    """Bytes of the model's weights that lie in its file, mapped: they cost no RAM that the system cannot take back."""
    weights = (weight for block in stream.session.parts.blocks for weight in block.weights)
    return sum(weight.codec.stored_bytes for weight in weights if is_mapped(weight.home))
