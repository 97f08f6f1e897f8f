"""Copies of what patches hold in page-locked memory: for good, of patches that are applied whenever a layer runs, and
in passing, of those that are baked.

In: values of `add_patches`. Out: the same, with tensors that cross the link at its full speed while the host goes on,
or with tensors on the card that were copied from there, or from their file where the system keeps it. From ordinary
memory each would be converted by the processor and copied at a fraction of that speed, and the host would wait for
each, and for all that compute has to do before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from comfy.weight_adapter import WeightAdapterBase

from ..engine.codec import align, codec_for
from ..engine.device import Device
from ..engine.host_memory import HostMemory, HostMemoryFull
from ..engine.mapped import FileSlice
from ..engine.originals import Originals
from ..engine.pages import copy_alone
from ..engine.store import Buffer, Slab
from .files import file_of

# Two of these are locked while patches are baked. What holds more than one, as merges do, goes its way without.
FERRY_BYTES = 16 * 1024**2


class Locked(NamedTuple):
    """A value with its tensors in page-locked memory, their bytes there, and what keeps those locked."""

    value: Any
    stored: torch.Tensor
    slab: Slab

    def on_card(self, memory: torch.Tensor, device: Device) -> Any:
        """Start to copy the bytes into `memory`, uint8 of the card and as many; give the value with its tensors there,
        for compute.
        """
        compute = device.compute_stream()
        device.copy(memory, self.stored, compute, compute)
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


class Ferry:
    """The way of what patches hold to the card, for the time of a load: from their file, as `files` locks it, or by way
    of two page-locked buffers: while one is filled, what was in the other is on its way.
    """

    def __init__(self, device: Device, memory: HostMemory, files: Originals) -> None:
        self._device = device
        self._memory = memory
        self._files = files
        self._used_files: set[FileSlice] = set()
        self._buffers: list[Buffer] = []
        self._used_bytes = 0

    def on_card(self, value: Any) -> Any:
        """`value` with its tensors on the card, where compute finds them; itself where there are none, or too large.

        Raises torch.OutOfMemoryError.
        """
        tensors = _tensors(value)
        size_bytes = sum(align(tensor.nbytes) for tensor in tensors)
        in_files = [self._in_file(tensor) for tensor in tensors]
        if tensors and None not in in_files:
            there = self._from_files(tensors, in_files, size_bytes)
        elif 0 < size_bytes <= FERRY_BYTES:
            there = self._from_buffer(tensors, size_bytes)
        else:
            return value
        coming = iter(there)
        return _replaced(value, lambda _: next(coming))

    def _in_file(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The bytes of `tensor` in the locked pages of its file; None where it has none, or they cannot be locked."""
        file = file_of(tensor) if self._files.can_lock else None
        if file is None:
            return None
        whole = file.whole()
        if whole not in self._used_files:
            self._files.lock([whole])
            self._used_files.add(whole)
        pages = self._files.bytes_of(whole)
        return None if pages is None else pages[file.offset : file.offset + file.size_bytes]

    def _from_files(
        self, tensors: Sequence[torch.Tensor], stored: Sequence[torch.Tensor | None], size_bytes: int
    ) -> list[torch.Tensor]:
        compute, memory = self._device.compute_stream(), self._device.allocate(size_bytes)
        there, begin = [], 0
        for tensor, source in zip(tensors, stored, strict=True):
            assert source is not None
            place = memory[begin : begin + tensor.nbytes]
            self._device.copy(place, source, compute, compute)
            there.append(place.view(tensor.dtype).view(tensor.shape))
            begin += align(tensor.nbytes)
        return there

    def _from_buffer(self, tensors: Sequence[torch.Tensor], size_bytes: int) -> list[torch.Tensor]:
        if not self._buffers or self._used_bytes + size_bytes > FERRY_BYTES:
            self._change_buffers()
        buffer, compute = self._buffers[-1], self._device.compute_stream()
        stored = buffer.slab.stored[self._used_bytes : self._used_bytes + size_bytes]
        self._used_bytes += size_bytes
        memory, there, begin = self._device.allocate(size_bytes), [], 0
        for tensor in tensors:
            there.append(_written(tensor, stored[begin:], memory[begin:]))
            begin += align(tensor.nbytes)
        self._device.copy(memory, stored, compute, compute)
        buffer.sent.record(compute)
        return there

    def _change_buffers(self) -> None:
        if len(self._buffers) < 2:
            self._buffers.append(Buffer(self._device, self._memory, FERRY_BYTES))
        else:
            self._buffers.reverse()
            self._buffers[-1].sent.synchronize()
        self._used_bytes = 0

    def close(self) -> None:
        """Give the buffers back, after the copies from them. Files that other patches were in are no longer locked."""
        if self._used_files:
            self._files.keep_only(self._used_files)
        for buffer in self._buffers:
            buffer.sent.synchronize()
            buffer.slab.close()
        self._buffers.clear()


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors that `_replaced` would replace."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _replaced(value, note)
    return found


def _written(tensor: torch.Tensor, stored: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Write the bytes of `tensor` to the beginning of `stored`; give the tensor that has them in `place`."""
    if tensor.is_contiguous():
        copy_alone(tensor, stored)
        return place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    codec = codec_for(tensor)
    codec.encode(tensor, stored)
    return codec.decode(place)


def _size_bytes(value: Any) -> int:
    """What the tensors in `value` take one after another."""
    return sum(align(tensor.nbytes) for tensor in _tensors(value))


def _copied(value: Any, stored: torch.Tensor) -> Any:
    """`value` with its tensors copied into `stored`."""
    begin = 0

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal begin
        place = stored[begin:]
        begin += align(tensor.nbytes)
        return _written(tensor, place, place)

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
