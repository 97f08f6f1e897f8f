"""Residents that keep page-locked copies: they leave and come back without being read or locked again."""

from __future__ import annotations

import gc

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
