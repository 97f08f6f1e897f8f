"""LoRAs that are applied whenever their layers run: chosen where RAM is short, never lost, and nothing is loaded again
for them. That they give the bits of ComfyUI's low-memory way is in `test_lora_table.py`.
"""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
import torch
from layerstream.streaming.host import run_time_patches
from layerstream.streaming.host.budget import LEAST_LEFT_BYTES, SPARE_RAM_BYTES, Budget, host_memory
from layerstream.streaming.host.patcher import StreamingModelPatcher
from layerstream.streaming.host.settings import GIB, Patching

from loras import apply, assert_survives_a_retry, assert_survives_faults, make_lora, on_low_memory
from saving import assert_same, saved
from scripts.tiny_models import build_tiny_model
from streamed import locks_of, on_simulated_card, stream


@pytest.fixture
def card(monkeypatch):
    on_simulated_card(monkeypatch, seed=5)


def at_run_time(model, kept: float) -> StreamingModelPatcher:
    streamed = stream(model, kept)
    streamed.settings = replace(streamed.settings, patching=Patching.RUN_TIME)
    return streamed


@pytest.fixture
def free_ram(monkeypatch):
    """A function that sets the RAM that seems to be free beside what is always left."""
    real = psutil.virtual_memory()

    def give(free_bytes: int) -> None:
        shown = real._replace(available=SPARE_RAM_BYTES + free_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: shown)

    return give


def test_with_ram_for_them_they_are_baked_and_without_at_run_time(card, load, sample, free_ram, caplog):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    baked = sample(apply(model, lora, 0.8))
    others = sample(on_low_memory(apply(model, lora, 0.8)))
    assert not torch.equal(baked, others), "the ways do not differ here"
    streamed = stream(model, 0.0)
    free_ram(0)
    short = apply(streamed, lora, 0.8)
    assert torch.equal(sample(short), others)
    assert "whenever their layers run" in caplog.text
    assert short.streaming_report()["run_time_patches"] == len(lora) // 2
    free_ram(model.model_size())
    assert torch.equal(sample(short), others), "the image of a graph would change with what else runs"
    enough = apply(streamed, lora, 0.8)
    assert torch.equal(sample(enough), baked)
    assert enough.streaming_report()["run_time_patches"] == 0
    free_ram(0)
    assert torch.equal(sample(apply(streamed, lora, 0.8)), baked), "there is the room of those before"


def test_no_room_for_them_stands_though_others_were_loaded_since(card, load, sample, free_ram):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    streamed = stream(model, 0.0)
    free_ram(0)
    short = apply(streamed, lora, 0.8)
    image = sample(short)
    assert short.streaming_report()["run_time_patches"]
    free_ram(model.model_size())
    sample(streamed)
    assert torch.equal(sample(short), image)


def test_what_was_measured_without_them_does_not_hold_with_them(card, load, sample):
    model = load("flux", size="tiny")
    streamed = at_run_time(model, 0.5)
    sample(streamed)
    first, second = (apply(streamed, make_lora(model, seed=seed), 0.8) for seed in (1, 2))
    for patcher, holds in ((first, False), (second, True), (streamed, False), (streamed, True)):
        patcher.stream.fitting_bytes = model.model_size()
        sample(patcher)
        assert (patcher.stream.fitting_bytes is not None) == holds


def test_a_merged_model_is_not_copied_where_ram_is_short(card, load, sample, monkeypatch):
    model, other = load("flux", size="tiny"), build_tiny_model("flux")
    merged = at_run_time(model, 0.0).clone()
    merged.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
    real, before_bytes = psutil.virtual_memory(), host_memory().total_bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=0))
    monkeypatch.setattr(run_time_patches, "LITTLE_BYTES", 0)
    sample(merged)
    assert merged.streaming_report()["run_time_patches"]
    assert host_memory().total_bytes - before_bytes == merged.stream.session.host_bytes


def test_residents_are_baked_in_the_memory_of_the_card(card, load, sample, free_ram):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    expected = sample(apply(model, lora, 0.8))
    free_ram(LEAST_LEFT_BYTES - GIB - SPARE_RAM_BYTES)
    fitting = stream(model, 1.0)
    assert torch.equal(sample(apply(fitting, lora, 0.8)), expected)


def test_a_ceiling_on_ram_counts(card, load, sample):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    others = sample(on_low_memory(apply(model, lora, 0.8)))
    budget = Budget(ram_gib=1.2 * model.model_size() / 1024**3)
    streamed = stream(model, 0.0)
    streamed.settings = replace(streamed.settings, budget=budget)
    budget.add(streamed.stream)
    sample(streamed)
    assert torch.equal(sample(apply(streamed, lora, 0.8)), others)


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_nothing_is_loaded_again_for_them(monkeypatch, load, sample, kept, is_packed):
    on_simulated_card(monkeypatch, seed=5, is_packed=is_packed)
    model = load("zimage", size="tiny")
    first, second = make_lora(model, seed=1), make_lora(model, seed=2)
    branches = ((first, 1.0), (first, 0.5), (second, -0.5))
    expected = [sample(on_low_memory(apply(model, lora, strength))) for lora, strength in branches]
    plain = sample(model)
    streamed = at_run_time(model, kept)
    assert torch.equal(sample(streamed), plain) and streamed.stream.session.is_packed == is_packed
    # The first may take the place of weights on the card.
    assert torch.equal(sample(apply(streamed, first, 1.0)), expected[0])
    # Held, so that nothing new can lie where something old was.
    before = model.model.diffusion_model.state_dict()
    for _ in range(2):
        for (lora, strength), result in zip(branches, expected, strict=True):
            assert torch.equal(sample(apply(streamed, lora, strength)), result)
    weights = model.model.diffusion_model.state_dict()
    assert all(tensor.data_ptr() == before[name].data_ptr() for name, tensor in weights.items())
    assert torch.equal(sample(streamed), plain)


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_they_are_on_the_card_within_the_budget_while_their_model_is(card, load, sample, kept):
    model = load("zimage", size="tiny")
    lora = make_lora(model, seed=1)
    expected, plain = sample(on_low_memory(apply(model, lora, 0.8))), sample(model)
    streamed = at_run_time(model, kept)
    device, budget_bytes = streamed.stream.device, int(streamed.settings.vram_gib * GIB) or model.model_size()
    sample(streamed)
    without_bytes = streamed.loaded_size()
    patched = apply(streamed, lora, 0.8)
    assert torch.equal(sample(patched), expected)
    lora_bytes = sum(tensor.nbytes for tensor in lora.values())
    assert patched.streaming_report()["patch_bytes"] >= lora_bytes
    assert patched.loaded_size() == device.taken_bytes() <= budget_bytes + lora_bytes * (kept == 1.0)
    assert torch.equal(sample(streamed), plain)
    assert streamed.stream.patch_bytes == 0 and streamed.loaded_size() == without_bytes
    for leave in (patched.detach, lambda: sample(model)):  # ComfyUI's own patcher takes the model over
        assert torch.equal(sample(patched), expected) and patched.stream.patch_bytes
        leave()
        assert patched.stream.patch_bytes == device.taken_bytes() == 0


def test_they_stay_in_ram_where_the_card_has_no_room_beside_what_streams(card, load, sample):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    expected = sample(on_low_memory(apply(model, lora, 0.8)))
    streamed = at_run_time(model, 1e-6)  # of the budget nothing is left but for rings
    patched = apply(streamed, lora, 0.8)
    assert torch.equal(sample(patched), expected)
    assert patched.streaming_report()["run_time_patches"] and patched.stream.patch_bytes == 0


def test_weights_make_way_for_them_on_a_full_card(card, load, sample, monkeypatch):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    expected = sample(on_low_memory(apply(model, lora, 0.8)))
    streamed = at_run_time(model, 0.5)
    sample(streamed)
    device = streamed.stream.device
    full_bytes = device.taken_bytes() + streamed.stream.session.plan.ring_bytes
    monkeypatch.setattr(device, "budget_bytes", full_bytes)
    patched = apply(streamed, lora, 0.8)
    assert torch.equal(sample(patched), expected) and patched.stream.patch_bytes


def test_they_survive_faults(card, load, sample):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    expected = sample(on_low_memory(apply(model, lora, 1.0)))
    patched = apply(at_run_time(model, 0.5), lora, 1.0)
    assert_survives_a_retry(patched, sample, expected)
    assert_survives_faults(patched, sample, expected)


def test_their_tensors_lie_in_page_locked_memory_once(card, load, sample, monkeypatch):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    streamed = at_run_time(model, 0.0)
    sample(streamed)
    locked = locks_of(monkeypatch, streamed)
    patched = apply(streamed, lora, 1.0)
    for _ in range(2):
        sample(patched)
    assert len(locked) == 1 and locked[0] >= sum(tensor.nbytes for tensor in lora.values())


def test_what_is_saved_has_them_once(card, load, sample, tmp_path):
    model = load("flux", size="tiny")
    lora = make_lora(model, seed=1)
    expected = saved(apply(model, lora, 0.8), tmp_path / "resident.safetensors")
    patched = apply(at_run_time(model, 0.5), lora, 0.8)
    image = sample(patched)
    assert_same(saved(patched, tmp_path / "streamed.safetensors"), expected)
    assert torch.equal(sample(patched), image)
    patched.detach()
    assert torch.equal(sample(build_tiny_model("flux")), sample(model)), "something of them is left in the model"
