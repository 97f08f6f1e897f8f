"""Copies of what patches hold in page-locked memory, for patches that are applied whenever a layer runs.

In: values of `add_patches`. Out: the same, with tensors that cross the link at its full speed while the host goes on,
or with tensors on the card that were copied from there. From ordinary memory each would be copied at a fraction of that
speed, and the host would wait for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from comfy.weight_adapter import WeightAdapterBase

from ..engine.codec import align, codec_for
from ..engine.device import Device
from ..engine.store import HostMemory, HostMemoryFull, Slab


class Locked(NamedTuple):
    """A value with its tensors in page-locked memory, their bytes there, and what keeps those locked."""

    value: Any
    stored: torch.Tensor
    slab: Slab

    def on_card(self, memory: torch.Tensor) -> Any:
        """Copy the bytes into `memory`, uint8 of the card and as many; give the value with its tensors there."""
        memory.copy_(self.stored, non_blocking=True)
        begin = self.stored.data_ptr()

        def there(tensor: torch.Tensor) -> torch.Tensor:
            return codec_for(tensor).decode(memory[tensor.data_ptr() - begin :])

        return _replaced(self.value, there)


def page_locked(values: Sequence[Any], device: Device, memory: HostMemory, most_bytes: float) -> list[Locked] | None:
    """Copy the tensors in `values`, any nesting of tuples, lists and ComfyUI's adapters, into page-locked memory.

    Gives None where there are none, they take more than `most_bytes`, or no more memory can be locked.
    """
    size_bytes = sum(_size_bytes(value) for value in values)
    if not 0 < size_bytes <= most_bytes:
        return None
    try:
        slab = Slab(device, memory, 0, size_bytes)
    except HostMemoryFull:
        return None
    if not slab.is_locked:
        slab.close()
        return None
    locked, begin = [], 0
    for value in values:
        stored = slab.stored[begin : begin + _size_bytes(value)]
        locked.append(Locked(_copied(value, stored), stored, slab))
        begin += stored.nbytes
    return locked


def _size_bytes(value: Any) -> int:
    """What the tensors in `value` take one after another."""
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(align(codec_for(tensor).stored_bytes))
        return tensor

    _replaced(value, note)
    return sum(sizes)


def _copied(value: Any, stored: torch.Tensor) -> Any:
    """`value` with its tensors copied into `stored`."""
    begin = 0

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal begin
        codec, place = codec_for(tensor), stored[begin:]
        codec.encode(tensor, place)
        begin += align(codec.stored_bytes)
        return codec.decode(place)

    return _replaced(value, copy)


def _replaced(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with plain tensors of the host replaced, in the order in which they are met."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return replace(value) if value.device.type == "cpu" and value.numel() else value
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _replaced(value.weights, replace))  # type: ignore[call-arg]
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, replace) for item in value)
    return value
