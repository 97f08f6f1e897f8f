"""The simulated device catches what it is there to catch: each test breaks an ordering rule on purpose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from layerstream.streaming.engine import ring
from layerstream.streaming.engine.simulated import OrderingError, SimulatedDevice, SimulatedStream

from walkers import ALL_STREAMED, attach, make_input, make_walker, one_pass, plan_for


def streamed_output(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    walker = make_walker()
    x = make_input(walker)
    expected = walker(x)
    session = attach(walker, SimulatedDevice(1 << 30, seed))
    session.load(plan_for(session, ALL_STREAMED))
    for _ in range(3):
        output = one_pass(session, walker, x)
    return output, expected


def test_compute_that_does_not_wait_for_its_copy_reads_poison(monkeypatch):
    obedient = SimulatedStream.wait_event

    def only_copies_wait(self, event) -> None:
        if self.deferred:
            obedient(self, event)

    monkeypatch.setattr(SimulatedStream, "wait_event", only_copies_wait)
    # whether a copy comes too late is a matter of chance: of five seeds most must show it
    outputs = [streamed_output(seed) for seed in range(5)]
    assert sum(not torch.equal(output, expected) for output, expected in outputs) >= 3
    assert any(output.isnan().any() for output, _ in outputs)


def test_a_copy_that_does_not_wait_for_the_last_reader_is_an_error(monkeypatch):
    give = ring.Ring.give

    def give_without_waiting(self, index, stream, *conditions):
        return give(self, index, SimpleNamespace(wait_event=lambda event: None, append=stream.append), *conditions)

    monkeypatch.setattr(ring.Ring, "give", give_without_waiting)
    with pytest.raises(OrderingError):
        streamed_output(seed=0)


def test_a_copy_into_fresh_memory_must_wait_for_whoever_had_it():
    device = SimulatedDevice(1000)
    device.event().record(device.compute_stream())
    copies, memory = device.copy_stream(), device.allocate(100)
    with pytest.raises(OrderingError):
        device.copy(memory, torch.zeros(100, dtype=torch.uint8), copies, device.compute_stream())
    begun = device.event()
    begun.record(device.compute_stream())
    copies.wait_event(begun)
    device.copy(memory, torch.zeros(100, dtype=torch.uint8), copies, device.compute_stream())


def test_the_budget_is_enforced_and_freed_memory_counts_again():
    device = SimulatedDevice(1000)
    memory = device.allocate(600)
    with pytest.raises(torch.OutOfMemoryError, match="400 of 1000 free"):
        device.allocate(401)
    view = memory[10:20]
    del memory
    assert device.free_bytes() == 400, "a view keeps its memory"
    del view
    assert device.free_bytes() == 1000
    assert device.peak_bytes() == 600


def test_fresh_memory_is_poison_in_every_float_format():
    memory = SimulatedDevice(1024).allocate(64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        assert memory.view(dtype).float().isnan().all()
