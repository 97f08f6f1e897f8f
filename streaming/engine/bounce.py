"""Brings what a file holds to the device by way of page-locked buffers: some are read, others copied. And what was made
of it back to the host.

In: where bytes lie in a file, and device memory, or none for what is only worked on. Out: the bytes there, as soon as
the compute stream has come so far.
Copied from its mapping, they would have the mapping's pages count as this process's memory; what is locked in pages of
its own is copied from there. What will be asked for next is read ahead, while whoever asks is busy with what came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .device import Device, Event, Stream
from .host_memory import HostMemory
from .mapped import CAN_READ, FileSlice, Reading
from .originals import Originals
from .ring import Place
from .store import Buffer

BUFFERS = 8
BUFFER_BYTES = 32 * 1024**2

# What is smaller is not worth the buffers.
WORTH_BYTES = 1024**2


class Piece(NamedTuple):
    """What one buffer holds: the bytes of a file's slice from `begin` on."""

    file: FileSlice
    begin: int


class Bounce:
    """The way from a file to the device, for the time of a load."""

    def __init__(self, device: Device, host_memory: HostMemory, originals: Originals) -> None:
        self._device = device
        self._host_memory = host_memory
        self._originals = originals
        self._idle: deque[Buffer] = deque()
        self._begun: dict[Piece, tuple[Buffer, Reading]] = {}
        self._coming: deque[Piece] = deque()

    def look_ahead(self, files: Iterable[FileSlice]) -> None:
        """Begin to read what will be brought next, in this order, as far as there are buffers. What was begun of other
        files makes way.
        """
        if not CAN_READ:
            return
        worth = (file for file in files if file.size_bytes >= WORTH_BYTES and file not in self._originals)
        pieces = [piece for file in worth for piece in _pieces(file)]
        for piece in self._begun.keys() - pieces:
            self._give_up(piece)
        self._coming = deque(piece for piece in pieces if piece not in self._begun)
        self._read_ahead()

    def bring(self, file: FileSlice, destination: torch.Tensor, stream: Stream | None = None) -> bool:
        """Start to fill device memory `destination` (uint8 [size_bytes]) on `stream`, or on compute's, which what is
        small is copied on in any case; False where this system cannot.

        Raises OSError when the file has become shorter.
        """
        compute = self._device.compute_stream()
        locked = self._originals.bytes_of(file)
        if locked is not None:
            self._device.copy(destination, locked, stream or compute, compute)
            return True
        if not CAN_READ:
            return False
        if file.size_bytes < WORTH_BYTES:
            stored = torch.empty(file.size_bytes, dtype=torch.uint8)
            file.read_into(stored)
            destination.copy_(stored)
            return True
        stream = stream or compute
        for piece in _pieces(file):
            target = destination[piece.begin : piece.begin + BUFFER_BYTES]
            if piece not in self._begun:
                if piece in self._coming:
                    self._coming.remove(piece)
                self._begin(piece, self._next_buffer())
            buffer, reading = self._begun.pop(piece)
            self._idle.append(buffer)
            reading.finish()
            self._device.copy(target, buffer.slab.stored[: target.numel()], stream, compute)
            buffer.sent.record(stream)
            self._read_ahead()
        return True

    def _read_ahead(self) -> None:
        while self._coming and (buffer := self._free_buffer()) is not None:
            self._begin(self._coming.popleft(), buffer)

    def _begin(self, piece: Piece, buffer: Buffer) -> None:
        stored = buffer.slab.stored[: piece.file.size_bytes - piece.begin]
        self._begun[piece] = buffer, piece.file.begin_reading(stored, piece.begin)

    def _free_buffer(self) -> Buffer | None:
        """A buffer whose bytes are on the device; None while there is none."""
        if len(self._idle) + len(self._begun) < BUFFERS:
            return Buffer(self._device, self._host_memory, BUFFER_BYTES)
        return self._idle.popleft() if self._idle and self._idle[0].sent.query() else None

    def _next_buffer(self) -> Buffer:
        """A buffer whose bytes are on the device, whatever it takes."""
        buffer = self._free_buffer()
        if buffer is None:
            if not self._idle:
                self._give_up(next(reversed(self._begun)))
            buffer = self._idle.popleft()
            buffer.sent.synchronize()
        return buffer

    def _give_up(self, piece: Piece) -> None:
        buffer, reading = self._begun.pop(piece)
        reading.stop()
        self._idle.appendleft(buffer)

    def finish(self) -> None:
        """End a load: give the buffers back, after the copies from them."""
        self.look_ahead(())
        for buffer in self._idle:
            buffer.sent.synchronize()
            buffer.slab.close()
        self._idle.clear()


class Turns:
    """Two places on the device for what is worked on one after another: the next comes, on a stream of its own, while
    compute is busy with the one before.
    """

    def __init__(self, device: Device, bounce: Bounce) -> None:
        self._device = device
        self._bounce = bounce
        self._places: list[Place] = []  # the one that was longer idle first
        self._given: Place | None = None
        self._begun: tuple[FileSlice, Place] | None = None
        self._coming: deque[FileSlice] = deque()
        self._stream: Stream | None = None

    @property
    def under_way(self) -> FileSlice | None:
        """What comes though it was not asked for yet."""
        return self._begun[0] if self._begun is not None else None

    def look_ahead(self, files: Iterable[FileSlice]) -> None:
        """Take note of what will be brought next, in this order."""
        self._coming = deque(files)

    def bring(self, file: FileSlice) -> torch.Tensor | None:
        """Give the bytes on the device to compute, uint8 [size_bytes], which stay until the next call; None where this
        system cannot. What is known to come next is under way then.

        Raises OSError when a file has become shorter, and torch.OutOfMemoryError.
        """
        if not CAN_READ:
            return None
        compute = self._device.compute_stream()
        if self._given is not None:  # all work on it was given to compute by now
            self._given.free.record(compute)
            self._device.note_read(self._given.memory, compute)
            self._given = None
        if self._begun is not None and self._begun[0] == file:
            self._given, self._begun = self._begun[1], None
        else:
            if self.under_way not in self._coming:
                self._begun = None
            self._given = self._begin(file)
        # Before the next is begun: that may be copied on compute, to where what came in vain is still on its way.
        compute.wait_event(self._given.ready)
        if file in self._coming:
            while self._coming.popleft() != file:
                pass
        if self._coming and self._begun is None:
            self._begun = self._coming[0], self._begin(self._coming[0])
        return self._given.memory[: file.size_bytes]

    def _begin(self, file: FileSlice) -> Place:
        """Start to bring the bytes to a place that is idle."""
        compute = self._device.compute_stream()
        stream = self._stream = self._stream or self._device.copy_stream()
        taken = {self._given, self._begun[1] if self._begun else None}
        place = next((place for place in self._places if place not in taken), None)
        if place is None:
            place = Place(0, self._device)
        else:
            self._places.remove(place)
        self._places.append(place)
        if place.memory.numel() < file.size_bytes:
            place.memory = torch.empty(0)
            place.memory = self._device.allocate(file.size_bytes)
            place.free.record(compute)  # which may still read there what was in this memory before
        stream.wait_event(place.free)
        self._bounce.bring(file, place.memory[: file.size_bytes], stream)
        place.ready.record(stream)
        return place

    def finish(self) -> None:
        """Give the places back, after the copies under way."""
        if self._begun is not None:
            self._device.compute_stream().wait_event(self._begun[1].ready)
        self._given = self._begun = None
        self._places.clear()
        self._coming.clear()


class Returns:
    """The way of what was worked out on the device back to the host, on a stream of its own: what crosses the link in
    both directions at once takes half the time of one after the other.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream: Stream | None = None
        self._under_way: tuple[Event, torch.Tensor] | None = None

    def send(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Start to copy device bytes `source` to host bytes `destination`, after what compute has to do so far. What
        compute has to do from the next call on waits for this copy, so that one more has room on the device and not
        many.
        """
        compute = self._device.compute_stream()
        stream = self._stream = self._stream or self._device.copy_stream()
        self._let_go(compute)
        computed, sent = self._device.event(), self._device.event()
        computed.record(compute)
        stream.wait_event(computed)
        self._device.copy(destination, source, stream, compute)
        sent.record(stream)
        self._under_way = sent, source

    def _let_go(self, compute: Stream) -> None:
        """Have memory that is read on its way taken again by none before it is read."""
        if self._under_way is not None:
            compute.wait_event(self._under_way[0])
            self._under_way = None

    def finish(self) -> None:
        """Wait for what is under way."""
        if self._under_way is not None:
            self._under_way[0].synchronize()
            self._let_go(self._device.compute_stream())


def _pieces(file: FileSlice) -> list[Piece]:
    return [Piece(file, begin) for begin in range(0, file.size_bytes, BUFFER_BYTES)]
