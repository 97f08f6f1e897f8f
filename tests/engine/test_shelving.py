"""Residents that keep page-locked copies: they leave and come back without being read or locked again."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from layerstream.streaming.engine.session import Marks, Session
from layerstream.streaming.engine.simulated import SimulatedDevice

from walkers import attach, make_input, make_walker, one_pass, plan_for

ROOMY = 1 << 30


@pytest.fixture
def device():
    return SimulatedDevice(ROOMY, seed=3)


def shelved(device: SimulatedDevice, walker) -> Session:
    session = attach(walker, device)
    session.shelve()
    return session


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_leaving_and_coming_back_locks_nothing_anew(device, kept):
    walker = make_walker()
    x = make_input(walker)
    expected = walker(x)
    session = shelved(device, walker)
    plan = plan_for(session, kept)
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)
    locked, held = device.locked_bytes, device.used_bytes
    session.unload()
    homes = {name: tensor.data_ptr() for name, tensor in walker.state_dict().items()}
    assert device.used_bytes == 0 and device.locked_bytes == locked
    assert torch.equal(walker(x), expected), "what left still works from the host"
    for _ in range(2):
        session.load(plan)
        assert torch.equal(one_pass(session, walker, x), expected)
        assert (device.locked_bytes, device.used_bytes) == (locked, held)
        session.unload()
    assert {name: tensor.data_ptr() for name, tensor in walker.state_dict().items()} == homes


@pytest.fixture
def late_copies(device, monkeypatch):
    """Copies that nobody waits for run only when someone waits for compute, or unlocks pages, as late as they may."""
    under_way = []
    copy, unlock = torch.Tensor.copy_, device.page_unlock

    def copy_late(destination, source, non_blocking=False):
        if non_blocking:
            under_way.append((destination, source))
        else:
            copy(destination, source)
        return destination

    def wait():
        while under_way:
            copy(*under_way.pop(0))

    def wait_and_unlock(address):
        wait()
        unlock(address)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_late)
    monkeypatch.setattr(device, "page_unlock", wait_and_unlock)
    monkeypatch.setattr(device.compute_stream(), "synchronize", wait)
    return under_way


def scaled(walker, factor):
    """What `load` takes for all large weights of the blocks times `factor`."""
    marks = Marks((factor,) * len(walker.blocks), None)
    return {"marks": marks, "changed": lambda weight: weight.home * factor if weight.home.dim() > 1 else None}


@pytest.mark.parametrize("is_shelving", [False, True], ids=["unshelved", "shelved"])
def test_what_comes_back_has_arrived_when_a_load_ends_or_its_slab_goes(device, late_copies, is_shelving):
    walker = make_walker()
    x = make_input(walker)
    expected = {None: walker(x)}
    for factor in (0.5, 2.0):
        other = make_walker()
        for block in other.blocks:
            block.up.weight.mul_(factor), block.down.weight.mul_(factor)
        expected[factor] = other(x)
    session = shelved(device, walker) if is_shelving else attach(walker, device)
    late = 0
    for kept, factor in itertools.product((0.0, 0.5, 1.0, 0.5), (None, 0.5, 2.0)):
        changes = {} if factor is None else scaled(walker, factor)

        def note(done: int, total: int) -> None:
            nonlocal late
            late += len(late_copies)

        session.load(plan_for(session, kept), progress=note, **changes)
        assert not late_copies
        assert torch.equal(one_pass(session, walker, x), expected[factor])
    session.unload()
    assert torch.equal(walker(x), expected[None])
    assert late or not is_shelving, "every copy was waited for by itself"


def test_a_load_that_fails_leaves_nothing_under_way_that_matters(device, late_copies):
    walker = make_walker()
    x = make_input(walker)
    expected = walker(x)
    session = shelved(device, walker)
    plan = plan_for(session, 1.0)
    session.load(plan)
    session.unload()

    def stop(done: int, total: int) -> None:
        if len(late_copies) > 2:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        session.load(plan, progress=stop)
    assert torch.equal(walker(x), expected)
    session.load(plan, **scaled(walker, 0.5))
    session.load(plan)
    assert torch.equal(one_pass(session, walker, x), expected)


def test_every_large_weight_has_its_locked_copy_and_is_in_memory_once(device):
    walker = make_walker()
    before = {name: tensor.data_ptr() for name, tensor in walker.state_dict().items()}
    session = shelved(device, walker)
    session.load(session.propose(None))
    large = {name for name, tensor in walker.state_dict().items() if tensor.nbytes >= 64 * 1024}
    assert session.page_locked_bytes >= sum(walker.state_dict()[name].nbytes for name in large) > 0
    session.unload()
    after = {name: tensor.data_ptr() for name, tensor in walker.state_dict().items()}
    assert all(after[name] != before[name] for name in large)


def test_a_changed_weight_comes_back_changed_without_being_computed_again(device):
    walker = make_walker()
    x = make_input(walker)
    session = shelved(device, walker)
    marks = Marks(("patched", *[None] * 7), None)
    computed = []

    def changed(weight):
        if not weight.keys[0].startswith("blocks.0."):
            return None
        computed.append(weight.keys[0])
        return weight.home + 1

    session.load(session.propose(None), marks=marks, changed=changed)
    patched = walker(x)
    large = [name for name in computed if walker.state_dict()[name].nbytes >= 64 * 1024]
    computed.clear()
    session.unload()
    unpatched = walker(x)
    session.load(session.propose(None), marks=marks, changed=changed)
    assert torch.equal(walker(x), patched) and not torch.equal(unpatched, patched)
    assert large and not set(computed) & set(large)


def test_closing_unlocks_everything(device):
    walker = make_walker()
    session = shelved(device, walker)
    session.load(session.propose(None))
    session.close()
    del session
    gc.collect()
    assert device.used_bytes == 0 and device.locked_bytes == 0
