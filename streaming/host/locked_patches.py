"""Copies of what patches hold in page-locked memory, for patches that are applied whenever a layer runs.

In: values of `add_patches`. Out: the same, with tensors that cross the link at its full speed while the host goes on.
From ordinary memory each would be copied at a fraction of it, and the host would wait for each.
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
    """The copies, and the memory they lie in, which is locked for as long as somebody keeps it."""

    values: list[Any]
    slab: Slab


def page_locked(values: Sequence[Any], device: Device, memory: HostMemory, most_bytes: float) -> Locked | None:
    """Copy the tensors in `values`, any nesting of tuples, lists and ComfyUI's adapters, into page-locked memory.

    Gives None where there are none, they take more than `most_bytes`, or no more memory can be locked.
    """
    tensors: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    _replaced(values, note)
    codecs = [codec_for(tensor) for tensor in tensors]
    size_bytes = sum(align(codec.stored_bytes) for codec in codecs)
    if not 0 < size_bytes <= most_bytes:
        return None
    try:
        slab = Slab(device, memory, 0, size_bytes)
    except HostMemoryFull:
        return None
    if not slab.is_locked:
        slab.close()
        return None
    copies, offset = [], 0
    for tensor, codec in zip(tensors, codecs, strict=True):
        stored = slab.stored[offset : offset + codec.stored_bytes]
        codec.encode(tensor, stored)
        copies.append(codec.decode(stored))
        offset += align(codec.stored_bytes)
    rest = iter(copies)
    return Locked(_replaced(values, lambda _: next(rest)), slab)


def _replaced(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with plain tensors of the host replaced, in the order in which they are met."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return replace(value) if value.device.type == "cpu" and value.numel() else value
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _replaced(value.weights, replace))  # type: ignore[call-arg]
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, replace) for item in value)
    return value
