"""Memory that is asked for while a model is loaded or runs: what it gives, what it says, and the run afterwards."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from loras import apply, make_lora
from streamed import on_simulated_card, stream

FAMILY = "flux"


@pytest.fixture
def card(monkeypatch):
    on_simulated_card(monkeypatch, seed=11)


def test_partial_unloading_frees_what_it_says_and_the_next_run_is_right(card, load, sample):
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    streamed = stream(model, 0.8)
    device = streamed.stream.device
    sample(streamed)
    held, used = streamed.loaded_size(), device.used_bytes
    freed = streamed.partially_unload(streamed.offload_device, held // 3)
    assert held // 3 <= freed == held - streamed.loaded_size() == used - device.used_bytes
    assert torch.equal(sample(streamed), expected)
    assert streamed.loaded_size() == held


@pytest.mark.parametrize("requests", [1, 2])
def test_pressure_between_two_passes_of_a_run_shrinks_the_plan(card, load, sample, requests):
    model = load(FAMILY, size="tiny")
    expected = sample(model, steps=4)
    streamed = stream(model, 0.8)
    freed = []

    def under_pressure():
        if streamed.stream.session.meter.passes == 2:
            for _ in range(requests):
                held, used = streamed.loaded_size(), streamed.stream.device.used_bytes
                freed.append(streamed.partially_unload(streamed.offload_device, held // 8))
                assert freed[-1] == held - streamed.loaded_size() == used - streamed.stream.device.used_bytes

    assert torch.equal(sample(before_passes(streamed, under_pressure), steps=4), expected)
    assert len(freed) == requests and min(freed) > 0


@pytest.mark.parametrize("share", [1 / 4, 1 / 16])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_pressure_before_the_first_pass_of_a_run_shrinks_the_plan(card, load, sample, prefetch, share):
    """As of a control network's autoencoder, or of the other model where two take turns in each step."""
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    streamed = stream(model, 0.8, prefetch=prefetch)
    freed = []

    def under_pressure(executor, *args, **kwargs):
        wanted = int(share * streamed.loaded_size())
        freed.append(streamed.partially_unload(streamed.offload_device, wanted) - wanted)
        return executor(*args, **kwargs)

    streamed.add_wrapper_with_key("sampler_sample", "pressure", under_pressure)
    for _ in range(2):
        assert torch.equal(sample(streamed), expected)
    assert len(freed) == 2 and min(freed) >= 0
    streamed.stream.session.check()


@pytest.mark.parametrize(("share", "is_enough"), [(0.25, True), (0.99, False)])
def test_pressure_between_two_passes_of_a_run_in_which_nothing_streams(card, load, sample, share, is_enough):
    """It goes on with what is left, or where that does not do, has all come back."""
    model = load(FAMILY, size="tiny")
    model = apply(model, make_lora(model, seed=1), 0.7)
    expected = sample(model, steps=4)
    streamed = stream(model, 1.0)
    whole, freed = streamed.model_size(), []

    def under_pressure():
        if streamed.stream.is_in_place and not freed:
            assert streamed.stream.session.plan.is_resident
            freed.append(streamed.partially_unload(streamed.offload_device, int(share * whole)))

    assert torch.equal(sample(before_passes(streamed, under_pressure), steps=4), expected)
    plan = streamed.stream.session.plan
    assert plan.is_resident != is_enough
    assert 0 < freed[0] <= whole - plan.device_bytes or not is_enough
    assert torch.equal(sample(streamed, steps=4), expected)


@pytest.mark.parametrize("is_asked", [True, False], ids=["asked for too much", "unloaded"])
@pytest.mark.parametrize("share", [0.3, 1.0], ids=["streaming", "whole"])
def test_a_model_that_has_left_between_two_passes_comes_back_with_its_patches(card, load, sample, share, is_asked):
    model = load(FAMILY, size="tiny")
    model = apply(model, make_lora(model, seed=1), 0.7)
    expected = sample(model, steps=4)
    streamed = stream(model, share)
    device, passes = streamed.stream.device, []

    def leave():
        passes.append(streamed.stream.is_in_place)
        if len(passes) != 2:
            return
        if is_asked:
            loaded = comfy.model_management.current_loaded_models
            [entry] = [entry for entry in loaded if entry.model.model is streamed.model]
            assert entry.model_unload(entry.model.loaded_size() - 1)
            loaded.remove(entry)
        else:
            comfy.model_management.unload_all_models()
        assert not streamed.stream.is_in_place and device.used_bytes == 0

    assert torch.equal(sample(before_passes(streamed, leave), steps=4), expected)
    assert passes == [True] * 4
    comfy.model_management.unload_all_models()
    assert device.used_bytes == 0
    assert torch.equal(sample(streamed, steps=4), expected)


def before_passes(streamed, act):
    """A clone that calls `act` before the wrapper that opens a pass, so that it runs between passes."""

    def act_first(executor, *args, **kwargs):
        act()
        return executor(*args, **kwargs)

    watched = streamed.clone()
    watched.wrappers["apply_model"] = {"before": [act_first], **watched.wrappers["apply_model"]}
    return watched


def test_a_model_that_is_brought_inside_a_pass_leaves_this_one_as_it_is(card, load, sample):
    """As ComfyUI's control patches do that encode their image there: they have what was loaded loaded again."""
    model, other = load(FAMILY, size="tiny"), load(FAMILY, size="tiny")
    expected = sample(model)
    streamed = stream(model, 0.5)
    device, brought = streamed.stream.device, []

    def bring(module, args):
        loaded = comfy.model_management.loaded_models(only_currently_used=True)
        comfy.model_management.load_models_gpu([other])
        comfy.model_management.load_models_gpu(loaded)
        brought.append(streamed.stream.session.is_running)

    handle = model.model.diffusion_model.single_blocks[2].register_forward_pre_hook(bring)
    result = sample(streamed)
    handle.remove()
    assert torch.equal(result, expected)
    assert brought == [True, True]
    comfy.model_management.unload_all_models()
    assert device.used_bytes == 0


def test_a_request_inside_a_pass_is_refused_and_harmless(card, load, sample):
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    streamed = stream(model, 0.5)
    refused = []

    def greedy(module, args):
        refused.append(streamed.partially_unload(streamed.offload_device, 1 << 40))
        streamed.detach()

    handle = model.model.diffusion_model.single_blocks[2].register_forward_pre_hook(greedy)
    result = sample(streamed)
    handle.remove()
    assert refused == [0, 0]
    assert torch.equal(result, expected)
