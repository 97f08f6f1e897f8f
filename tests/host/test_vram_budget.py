"""VRAM Budget: kept by what is put under it together, shared between models, and hard where it is to be."""

from __future__ import annotations

import gc
import itertools
import sys

import comfy.model_management
import psutil
import pytest
import torch
from layerstream.nodes.layer_stream_clip import LayerStreamClip
from layerstream.nodes.layer_stream_model import LayerStreamModel
from layerstream.nodes.offload_policy import OffloadPolicy
from layerstream.nodes.vram_budget import VramBudget
from layerstream.streaming.engine.host_memory import Claim, HostMemoryFull
from layerstream.streaming.engine.plan import BudgetTooSmall
from layerstream.streaming.host.budget import Budget, host_memory, within
from layerstream.streaming.host.devices import device_for
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import GIB, Mode, StreamingSettings

from governed import Workflow, held_bytes, make_parts
from scripts.division import narrow_units
from streamed import on_simulated_card
from test_offload_policy import DEFAULTS as POLICY
from test_stages import equal

SEEDS = itertools.count(1000)

STREAMING = {"mode": "auto", "prefetch_blocks": 0, "vram_gb": 0.0, "min_free_mb": 0}


@pytest.fixture
def card(monkeypatch):
    """A card of its own for each test, so that peaks and limits are its own."""

    def make(size_gib: float = 8.0):
        on_simulated_card(monkeypatch, seed=next(SEEDS), size_gib=size_gib)
        return device_for(torch.device("cpu"))

    yield make
    comfy.model_management.unload_all_models()
    gc.collect()


def budget_of(**widgets) -> Budget:
    chosen = {"vram_gb": 0.0, "min_free_mb": 0, "ram_gb": 0.0, "hard_limit": False, **widgets}
    return VramBudget.execute(**chosen).args[0]


def streamed(model, budget, **widgets):
    return LayerStreamModel.execute(model, **{**STREAMING, **widgets}, budget=budget).args[0]


@pytest.mark.parametrize(
    ("own", "shared", "free_gib", "expected"),
    [
        (0.0, 0.0, 8.0, 0.0),
        (0.0, 3.0, 8.0, 3.0),
        (2.0, 3.0, 8.0, 2.0),
        (4.0, 3.0, 8.0, 3.0),
        (-6.0, 3.0, 8.0, 2.0),
        (0.0, -2.0, 8.0, 6.0),
        (5.0, -2.0, 6.0, 4.0),
    ],
)
def test_the_smaller_of_two_bounds_holds(card, load, own, shared, free_gib, expected):
    card(free_gib)
    settings = StreamingSettings(Mode.AUTO, vram_gib=own, min_free_mib=64, budget=Budget(shared, 128))
    patcher = StreamingModelPatcher.from_patcher(load("flux", size="tiny"), settings)
    resolved = within(settings, patcher.stream)
    assert resolved.vram_gib == pytest.approx(expected) and resolved.min_free_mib == 128
    assert resolved.is_explicit == (expected != 0)


def test_two_models_share_one_budget_and_the_split_is_told(card, load, sample):
    device = card()
    first, second = load("flux", size="tiny"), load("zimage", size="tiny")
    expected = [sample(first), sample(second)]
    sizes = [model.model_size() for model in (first, second)]
    budget = budget_of(vram_gb=(max(sizes) + 0.3 * min(sizes)) / GIB)
    patchers = [streamed(model, budget) for model in (first, second)]
    for _ in range(2):
        for index, patcher in enumerate(patchers):
            assert torch.equal(sample(patcher), expected[index])
            assert patcher.stream.session.plan.is_resident, "an idle model makes way for the one that samples"
            split = patcher.streaming_report()["budget_split_bytes"]
            assert sum(split.values()) == sum(map(held_bytes, patchers)) <= budget.vram_gib * GIB
            assert len(split) == 2 and max(split.values()) == max(map(held_bytes, patchers))
    assert device.peak_bytes() <= budget.vram_gib * GIB
    assert patchers[0].stream.moves.first.count == patchers[1].stream.moves.first.count == 1


def test_a_budget_smaller_than_each_model_is_kept_by_both(card, load, sample):
    device = card()
    first, second = load("flux", size="tiny"), load("zimage", size="tiny")
    expected = [sample(first), sample(second)]
    budget = budget_of(vram_gb=0.8 * min(first.model_size(), second.model_size()) / GIB)
    patchers = [streamed(model, budget) for model in (first, second)]
    for _ in range(2):
        for patcher, right in zip(patchers, expected, strict=True):
            assert torch.equal(sample(patcher), right)
            assert not patcher.stream.session.plan.is_resident
    assert device.peak_bytes() <= budget.vram_gib * GIB


def test_a_model_is_under_the_budget_of_the_node_that_runs(card, load, sample):
    """Not of the one that ComfyUI executed last: it keeps what nodes gave for the prompts after."""
    card()
    first, second = load("flux", size="tiny"), load("zimage", size="tiny")
    sizes = [model.model_size() for model in (first, second)]
    budget, other = (budget_of(vram_gb=(max(sizes) + share * min(sizes)) / GIB) for share in (0.3, 2.0))
    patchers = [streamed(model, budget) for model in (first, second)]
    streamed(first, other)
    for patcher in patchers:
        sample(patcher)
        assert sum(map(held_bytes, patchers)) <= budget.vram_gib * GIB


def test_a_budget_whose_place_another_has_taken_bounds_nothing_until_it_is_used_again(card, load, sample):
    device = card(size_gib=1.0)
    model = load("flux", size="tiny")
    held_gib = host_memory().total_bytes / GIB
    narrow, wide = (budget_of(vram_gb=gib, ram_gb=held_gib + gib, hard_limit=True) for gib in (0.05, 0.2))
    patchers = {budget: streamed(model, budget) for budget in (narrow, wide)}
    for budget in (wide, narrow, wide):
        sample(patchers[budget])
        assert device.free_bytes() == int(budget.vram_gib * GIB) - device.used_bytes
        room_bytes = int(budget.ram_gib * GIB) - host_memory().total_bytes
        assert host_memory().has_room(room_bytes) and not host_memory().has_room(room_bytes + 1)
    unbound = streamed(model, None)
    sample(unbound)
    assert device.free_bytes() == GIB - device.used_bytes and host_memory().has_room(room_bytes + 1)
    sample(patchers[narrow])
    assert device.free_bytes() == int(narrow.vram_gib * GIB) - device.used_bytes


def test_a_whole_workflow_under_one_budget(card, load, sample):
    device = card()
    parts = make_parts(load)
    expected = Workflow(parts, sample).run()
    whole = max(patcher.model_size() for patcher in (parts.model, parts.clip.patcher, parts.vae.patcher))
    budget = budget_of(vram_gb=1.2 * whole / GIB)
    with narrow_units():
        clip = LayerStreamClip.execute(parts.clip, **STREAMING, budget=budget).args[0]
    given = OffloadPolicy.execute(**{**POLICY, "mode": "auto"}, **parts._replace(clip=clip)._asdict(), budget=budget)
    workflow = Workflow(parts._make(given.args), sample)
    for _ in range(2):
        assert equal(workflow.run(), expected)
    assert device.peak_bytes() <= budget.vram_gib * GIB


def test_too_small_for_what_cannot_stream(card, load, sample):
    card()
    parts = make_parts(load)
    given = OffloadPolicy.execute(**POLICY, **parts._asdict(), budget=budget_of(vram_gb=0.001))
    workflow = Workflow(parts._make(given.args), sample)
    with pytest.raises(BudgetTooSmall, match=r"of weights that cannot stream: raise the budget to 0\.02 GiB"):
        workflow.decode()
    with pytest.raises(BudgetTooSmall, match="raise the budget to"):
        workflow.sample()


def test_a_hard_limit_holds_against_whoever_asks_and_ends_with_the_budget(card, load, sample):
    device = card(size_gib=1.0)
    model = load("flux", size="tiny")
    expected = sample(model)
    budget = budget_of(vram_gb=0.05, hard_limit=True)
    limit = int(0.05 * GIB)
    patcher = streamed(model, budget)
    assert torch.equal(sample(patcher), expected)
    with pytest.raises(torch.OutOfMemoryError):
        device.allocate(limit - device.used_bytes + 1)
    assert device.peak_bytes() <= limit and device.free_bytes() == limit - device.used_bytes
    wider = budget_of(vram_gb=0.2, hard_limit=True)
    assert device.free_bytes() == limit - device.used_bytes, "the smallest that is alive holds"
    del budget, patcher
    gc.collect()
    assert device.free_bytes() == int(wider.vram_gib * GIB) - device.used_bytes
    del wider
    gc.collect()
    assert device.free_bytes() == GIB - device.used_bytes


def test_a_negative_hard_limit_is_free_memory_less_that(card):
    device = card(size_gib=2.0)
    budget = budget_of(vram_gb=-0.5, min_free_mb=0, hard_limit=True)
    assert device.free_bytes() == int(1.5 * GIB)
    with pytest.raises(ValueError, match="raise vram_gb or lower min_free_mb"):
        budget_of(vram_gb=-3.0, hard_limit=True)
    assert device.free_bytes() == int(1.5 * GIB), "a limit that was refused changes nothing"
    del budget


def test_ram_ceilings(card, load, sample, caplog):
    device = card()
    model = load("flux", size="tiny")
    expected = sample(model)
    held_before = host_memory().total_bytes
    small = budget_of(ram_gb=(held_before + 0.2 * model.model_size()) / GIB)
    with pytest.raises(HostMemoryFull, match="raise ram_gb"):
        sample(streamed(model, small, mode="always"))
    assert device.used_bytes == 0
    assert torch.equal(sample(model), expected)
    del small
    gc.collect()
    enough = budget_of(ram_gb=(host_memory().total_bytes + 1.5 * model.model_size()) / GIB)
    patcher = streamed(model, enough, mode="always")
    assert torch.equal(sample(patcher), expected)
    assert host_memory().locked_bytes <= enough.ram_gib * GIB


@pytest.mark.parametrize(("share", "is_locked"), [(0.35, True), (0.45, False)])
def test_windows_locks_less_of_ram_so_that_buffers_can_be(monkeypatch, card, share, is_locked):
    device, host, memory = card(), host_memory(), torch.empty(4 << 20, dtype=torch.uint8)
    ram = psutil.virtual_memory()._replace(total=int((host.locked_bytes + memory.nbytes) / share))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: ram)
    monkeypatch.setattr(sys, "platform", "win32")
    claim = Claim(memory, device, host)
    assert claim.is_locked is is_locked
    claim.close()


def test_a_part_that_would_be_kept_locked_goes_without_where_ram_is_short(card, load, sample):
    card()
    parts = make_parts(load)
    expected = Workflow(parts, sample).run()
    budget = budget_of(ram_gb=(host_memory().total_bytes + 0.2 * parts.model.model_size()) / GIB)
    given = OffloadPolicy.execute(**{**POLICY, "mode": "cond_diffusion"}, **parts._asdict(), budget=budget)
    workflow = Workflow(parts._make(given.args), sample)
    for _ in range(2):
        assert equal(workflow.run(), expected)
    assert host_memory().total_bytes <= budget.ram_gib * GIB


def test_host_memory_is_given_back(card, load, sample):
    card()
    before = host_memory().total_bytes, host_memory().locked_bytes
    patcher = streamed(load("flux", size="tiny"), None, mode="always")
    sample(patcher)
    assert host_memory().locked_bytes > before[1]
    comfy.model_management.unload_all_models()
    del patcher
    gc.collect()
    assert (host_memory().total_bytes, host_memory().locked_bytes) == before


@pytest.mark.parametrize(
    ("widgets", "message"), [({"min_free_mb": -1}, "set it to 0 or more"), ({"ram_gb": -1.0}, "0 for automatic")]
)
def test_bad_input(widgets, message):
    with pytest.raises(ValueError, match=message):
        budget_of(**widgets)


def test_a_hard_limit_without_a_card_is_refused(monkeypatch):
    monkeypatch.delenv("LAYERSTREAM_SIMULATE_GIB", raising=False)
    with pytest.raises(ValueError, match="hard_limit cannot be kept"):
        budget_of(hard_limit=True)


def test_the_schema_is_complete():
    schema = VramBudget.define_schema()
    assert schema.node_id == "LayerStreamVramBudget"
    assert [item.id for item in schema.inputs] == ["vram_gb", "min_free_mb", "ram_gb", "hard_limit"]
    assert all(item.tooltip for item in schema.inputs)
