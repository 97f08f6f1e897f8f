"""Weights that are not in page-locked memory, on their way to the device: those that stay in their file, because RAM
has no room for copies, and those in slabs that were not to be locked.

In: how the bytes of such blocks are read. Out: page-locked buffers with those of the blocks that are copied next. A
thread reads them ahead; everything that concerns the device is done by the thread that runs the model.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .device import Device, Stream
from .host_memory import HostMemory
from .store import Buffer

# One is read while others wait for their copy; more even out what the file's disk takes longer for.
BUFFERS = 4

# What they take together where blocks are so large that fewer do.
MOST_BUFFER_BYTES = 1024**3


@dataclass(frozen=True)
class Staged:
    """The `nbytes` of a block that cross the link by way of a buffer.

    `read_into` writes them into a uint8 tensor [nbytes], from the file if they are `in_file`. Raises OSError when that
    can no longer be read.
    """

    nbytes: int
    read_into: Callable[[torch.Tensor], object]
    in_file: bool


def buffer_count(sizes: Collection[int]) -> int:
    """How many buffers serve blocks of these sizes, each as large as the largest of them."""
    return min(BUFFERS, len(sizes), max(1, MOST_BUFFER_BYTES // max(sizes, default=1)))


def staging_bytes(sizes: Collection[int]) -> int:
    """What the buffers take of host memory for blocks of these sizes."""
    return buffer_count(sizes) * max(sizes, default=0)


def choose_left(sizes: Mapping[int, int], room_bytes: float, present: set[int]) -> set[int]:
    """Which blocks of `sizes`, in the order they run, stay in their file so that the others fit into `room_bytes`.

    They are spread evenly, so that reading never pauses. Those that do so at `present` go on, joined by others if need
    be, unless they are far too many: what free RAM differs by from run to run shall not have much of the model read.
    """
    short_bytes = sum(sizes.values()) - room_bytes
    if short_bytes <= 0:
        return set()
    sizes = _sparing_giants(sizes, short_bytes)
    total_bytes = sum(sizes.values())
    least_bytes = min(total_bytes, short_bytes + staging_bytes(sizes.values()))
    left = set(present) if present <= sizes.keys() else set()
    if sum(sizes[index] for index in left) > least_bytes + total_bytes / 10:
        left.clear()
    kept = {index: size_bytes for index, size_bytes in sizes.items() if index not in left}
    kept_bytes = sum(kept.values())
    wanted_bytes = least_bytes - (total_bytes - kept_bytes)
    due_bytes, found_bytes = 0.0, 0
    for index, size_bytes in kept.items():
        due_bytes += size_bytes * wanted_bytes / kept_bytes
        if due_bytes - found_bytes > size_bytes / 2:
            left.add(index)
            found_bytes += size_bytes
    for index, size_bytes in kept.items():
        if found_bytes >= wanted_bytes:
            break
        if index not in left:
            left.add(index)
            found_bytes += size_bytes
    return left


def _sparing_giants(sizes: Mapping[int, int], short_bytes: float) -> Mapping[int, int]:
    """The blocks of `sizes` whose buffers take little of what they would make room for, if those suffice; else all."""
    most_bytes = sum(sizes.values()) / 10
    small = {index: size_bytes for index, size_bytes in sizes.items() if BUFFERS * size_bytes <= most_bytes}
    return small if sum(small.values()) >= short_bytes + staging_bytes(small.values()) else sizes


class Staging:
    """Reads the blocks in `sources` ahead of their copies."""

    def __init__(self, device: Device, host_memory: HostMemory, sources: Mapping[int, Staged]) -> None:
        self._sources = sources
        sizes = [source.nbytes for source in sources.values()]
        self._count = buffer_count(sizes)
        self._idle = deque(Buffer(device, host_memory, max(sizes)) for _ in range(self._count))
        self._staged: dict[int, tuple[Buffer, Future[object]]] = {}
        # One reads at a time, so what is read into a buffer follows what was read into it before.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layerstream-staging")

    def __contains__(self, index: int) -> bool:
        return index in self._sources

    def look_ahead(self, indices: Iterable[int]) -> None:
        """Begin to read the blocks that are copied next, soonest first, as far as there are buffers. What was read of
        others, for a pass that broke off or went another way, makes way.
        """
        soon = list(itertools.islice(indices, self._count))
        for index in soon:
            if index in self._staged:
                continue
            buffer = self._free_buffer() or self._taken_from_other_than(soon)
            if buffer is None:
                return
            self._read(index, buffer)

    def is_there(self, index: int) -> bool:
        """Whether `send` would not wait."""
        return index in self._staged and self._staged[index][1].done()

    def send(self, index: int, copy: Callable[[torch.Tensor], None], stream: Stream) -> None:
        """Have `copy` start the copy of a block's bytes on `stream`, after waiting for them.

        Raises what reading raised.
        """
        if index not in self._staged:
            self._read(index, self._free_buffer() or self._next_buffer())
        buffer, reading = self._staged.pop(index)
        self._idle.append(buffer)
        reading.result()
        copy(buffer.slab.stored[: self._sources[index].nbytes])
        buffer.sent.record(stream)

    def discard(self) -> None:
        """Forget what was read ahead, and what is being read: the bytes are about to change."""
        while (buffer := self._taken_from_other_than(())) is not None:
            self._idle.appendleft(buffer)

    def close(self) -> None:
        """Give the buffers back; no copy of them may be under way."""
        self._reader.shutdown(cancel_futures=True)
        for buffer in (*self._idle, *(buffer for buffer, _ in self._staged.values())):
            buffer.slab.close()
        self._idle.clear()
        self._staged.clear()

    def _read(self, index: int, buffer: Buffer) -> None:
        source = self._sources[index]
        reading = self._reader.submit(source.read_into, buffer.slab.stored[: source.nbytes])
        self._staged[index] = buffer, reading

    def _free_buffer(self) -> Buffer | None:
        """A buffer whose bytes were copied; None while there is none."""
        return self._idle.popleft() if self._idle and self._idle[0].sent.query() else None

    def _next_buffer(self) -> Buffer:
        """A buffer, whatever it takes: the one copied first, or that of the block which is needed last."""
        if self._idle:
            buffer = self._idle.popleft()
            buffer.sent.synchronize()
            return buffer
        taken = self._taken_from_other_than(())
        assert taken is not None, "a buffer is neither idle nor read into"
        return taken

    def _taken_from_other_than(self, soon: Collection[int]) -> Buffer | None:
        """The buffer of the last block that began to be read and is not among those needed `soon`; None without one."""
        index = next((index for index in reversed(self._staged) if index not in soon), None)
        if index is None:
            return None
        buffer, reading = self._staged.pop(index)
        reading.cancel()
        return buffer
