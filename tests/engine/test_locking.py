"""Host memory is locked while slabs are filled; what comes of it is known, and counted right, when it is asked for."""

from __future__ import annotations

import threading

import pytest
import torch
from layerstream.streaming.engine.host_memory import HostMemory
from layerstream.streaming.engine.simulated import SimulatedDevice
from layerstream.streaming.engine.store import Buffer, HostStore

from walkers import ALL_STREAMED, attach, make_input, make_walker, one_pass, plan_for

SIZE = 1000


class SlowDevice(SimulatedDevice):
    """Locks nothing larger than a byte before `go` is set, or at all where that takes long, nor in turns `refused`."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        super().__init__(1 << 30)
        self.go = threading.Event()
        self.refused = refused
        self.turns = 0

    def page_lock(self, memory: torch.Tensor, is_file: bool = False) -> bool:
        may_go = memory.nbytes == 1 or self.go.wait(10)
        self.turns += 1
        return may_go and self.turns - 1 not in self.refused and super().page_lock(memory, is_file)


def test_slabs_are_filled_while_the_first_is_locked():
    device, memory = SlowDevice(), HostMemory()
    store = HostStore(device, memory)
    for index in range(3):
        store.build(index, 0, SIZE).stored.fill_(index)
    assert device.locked_bytes == 0 and store.host_bytes == memory.locked_bytes == 3 * SIZE
    device.go.set()
    store.finish()
    assert device.locked_bytes == store.page_locked_bytes == 3 * SIZE
    assert all(store[index].is_locked and (store[index].stored == index).all() for index in range(3))
    store.close()
    assert device.locked_bytes == memory.locked_bytes == memory.total_bytes == store.host_bytes == 0


def test_what_the_system_refuses_is_not_counted_and_said_once(caplog):
    device, memory = SlowDevice(refused=(1, 2)), HostMemory()
    store = HostStore(device, memory)
    for index in range(4):
        store.build(index, 0, SIZE)
    device.go.set()
    store.finish()
    store.finish()
    assert [store[index].is_locked for index in range(4)] == [True, False, False, True]
    assert device.locked_bytes == memory.locked_bytes == store.page_locked_bytes == 2 * SIZE
    assert memory.total_bytes == store.host_bytes == 4 * SIZE
    assert caplog.text.count("page-locked") == 1
    for index in (1, 0):
        store.drop(index)
    assert device.locked_bytes == memory.locked_bytes == store.page_locked_bytes == SIZE
    store.close()
    assert device.locked_bytes == memory.locked_bytes == memory.total_bytes == 0


@pytest.mark.parametrize("refused", [(), (0,)], ids=["locked", "refused"])
def test_a_slab_that_goes_while_it_is_locked_is_unlocked_afterwards(refused):
    device, memory = SlowDevice(refused), HostMemory()
    store = HostStore(device, memory)
    store.build(0, 0, SIZE)
    threading.Timer(0.05, device.go.set).start()
    store.drop(0)
    assert device.turns == 1 and store.page_locked_bytes == 0
    store.finish()
    assert device.locked_bytes == memory.locked_bytes == memory.total_bytes == store.page_locked_bytes == 0


def test_a_buffer_does_not_wait_for_slabs():
    device, memory = SlowDevice(), HostMemory()
    store = HostStore(device, memory)
    store.build(0, 0, SIZE)
    buffer = Buffer(device, memory, 1)
    assert buffer.slab.is_locked and device.turns == device.locked_bytes == 1
    device.go.set()


def test_a_load_that_fails_leaves_no_memory_half_locked():
    walker, device = make_walker(), SlowDevice()
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, device)

    def fail_late(weight):
        if weight.keys[0] == "blocks.4.down.weight":
            threading.Timer(0.05, device.go.set).start()
            raise InterruptedError

    plan = plan_for(session, ALL_STREAMED)
    with pytest.raises(InterruptedError):
        session.load(plan, changed=fail_late)
    assert 0 < session.page_locked_bytes == session.host_bytes == device.locked_bytes
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)
    session.close()
    assert device.locked_bytes == 0


def test_a_device_that_fails_while_it_locks_loses_no_count():
    class Failing(SimulatedDevice):
        def page_lock(self, memory: torch.Tensor, is_file: bool = False) -> bool:
            raise RuntimeError("device lost")

    memory = HostMemory()
    store = HostStore(Failing(1 << 30), memory)
    store.build(0, 0, SIZE)
    store.finish()
    assert not store[0].is_locked and memory.total_bytes == SIZE and memory.locked_bytes == 0
    store.close()
    assert memory.total_bytes == memory.locked_bytes == store.host_bytes == 0


def test_sizes_are_known_while_memory_is_locked():
    """The live view asks for them at any time, and must not wait."""
    walker, device = make_walker(), SlowDevice()
    session = attach(walker, device)
    sizes = []

    def look(done: int, total: int) -> None:
        sizes.append(
            (session.link_bytes, session.in_file_bytes, session.packed_resident_bytes, session.page_locked_bytes)
        )
        assert not device.go.is_set() or done == total, "the look waited"
        if done == total:
            device.go.set()

    threading.Timer(3, device.go.set).start()
    session.load(plan_for(session, ALL_STREAMED), progress=look)
    assert 0 < sizes[len(sizes) // 2][0] < sizes[-1][0] == session.page_locked_bytes
    session.close()
