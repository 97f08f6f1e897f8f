"""Brings what a file holds to the device for good, by way of two page-locked buffers: one is read, the other copied.

In: where bytes lie in a file, and device memory. Out: the bytes there, as soon as the compute stream has come so far.
Copied from its mapping, they would have the mapping's pages count as this process's memory.
"""

from __future__ import annotations

from collections import deque

import torch

from .device import Device
from .mapped import CAN_READ, FileSlice
from .store import Buffer, HostMemory

BUFFERS = 2
BUFFER_BYTES = 32 * 1024**2

# What is smaller is not worth the buffers.
WORTH_BYTES = 1024**2


class Bounce:
    """The way from a file to the device, for the time of a load."""

    def __init__(self, device: Device, host_memory: HostMemory) -> None:
        self._device = device
        self._host_memory = host_memory
        self._buffers: deque[Buffer] = deque()

    def bring(self, file: FileSlice, destination: torch.Tensor) -> bool:
        """Start to fill device memory `destination` (uint8 [size_bytes]); False where this system cannot.

        Raises OSError when the file has become shorter.
        """
        if not CAN_READ:
            return False
        if file.size_bytes < WORTH_BYTES:
            stored = torch.empty(file.size_bytes, dtype=torch.uint8)
            file.read_into(stored)
            destination.copy_(stored)
            return True
        compute = self._device.compute_stream()
        for begin in range(0, file.size_bytes, BUFFER_BYTES):
            piece = destination[begin : begin + BUFFER_BYTES]
            buffer = self._next_buffer()
            stored = buffer.slab.stored[: piece.numel()]
            file.read_into(stored, begin)
            self._device.copy(piece, stored, compute, compute)
            buffer.sent.record(compute)
        return True

    def _next_buffer(self) -> Buffer:
        """A buffer whose bytes are on the device."""
        if len(self._buffers) < BUFFERS:
            self._buffers.append(Buffer(self._device, self._host_memory, BUFFER_BYTES))
        else:
            self._buffers.rotate(-1)
            self._buffers[-1].sent.synchronize()
        return self._buffers[-1]

    def finish(self) -> None:
        """End a load: give the buffers back, after the copies from them."""
        for buffer in self._buffers:
            buffer.sent.synchronize()
            buffer.slab.close()
        self._buffers.clear()
