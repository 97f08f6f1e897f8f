"""Blocks that are not in locked memory are read ahead of their copies, into buffers that are not copied any more."""

from __future__ import annotations

import time
from collections.abc import Mapping

from layerstream.streaming.engine.host_memory import HostMemory
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.engine.staging import Staged, Staging, staging_bytes


def counted(reads: list[int], sizes: Mapping[int, int]) -> dict[int, Staged]:
    """Blocks of `sizes` whose bytes are their index; `reads` is told of each that is read."""

    def source(index: int) -> Staged:
        def read_into(stored):
            reads.append(index)
            stored.fill_(index)

        return Staged(sizes[index], read_into, in_file=True)

    return {index: source(index) for index in sizes}


def test_blocks_are_read_ahead_and_none_into_a_buffer_that_is_still_copied():
    reads: list[int] = []
    sizes = {index: 1000 + index for index in range(10)}
    device = SimulatedDevice(1 << 20)
    stream, memory = device.copy_stream(), HostMemory()
    stream.chance.random = lambda: 1.0  # nothing is copied before someone waits for it
    staging = Staging(device, memory, counted(reads, sizes))
    assert memory.total_bytes == memory.locked_bytes == staging_bytes(sizes.values())
    staging.look_ahead(sizes)
    found = {index: device.allocate(size) for index, size in sizes.items()}
    for index in (0, 1, 2, 3):
        while not staging.is_there(index):
            pass
    assert reads == [0, 1, 2, 3] and not staging.is_there(4)
    for index in sizes:
        staging.send(index, lambda stored, index=index: device.copy(found[index], stored, stream, stream), stream)
        staging.look_ahead(sizes)
    stream.synchronize()
    assert all(bool((tensor == index).all()) for index, tensor in found.items())
    assert sorted(set(reads)) == sorted(sizes)
    staging.close()
    assert memory.total_bytes == device.locked_bytes == 0


def test_what_is_not_needed_soon_any_more_makes_way():
    reads: list[int] = []
    device = SimulatedDevice(1 << 20)
    staging = Staging(device, HostMemory(), counted(reads, dict.fromkeys(range(10), 1000)))
    staging.look_ahead([6, 7, 8, 9])
    staging.look_ahead([0, 1, 8, 2, 3])
    deadline = time.monotonic() + 10
    while not all(staging.is_there(index) for index in (0, 1, 8, 2)):
        assert time.monotonic() < deadline
    assert not staging.is_there(3) and reads.count(8) == 1
    stream, memory = device.copy_stream(), {index: device.allocate(1000) for index in (0, 1, 8, 2)}
    for index, found in memory.items():
        staging.send(index, lambda stored, found=found: device.copy(found, stored, stream, stream), stream)
    stream.synchronize()
    assert all(bool((found == index).all()) for index, found in memory.items())
    staging.close()
