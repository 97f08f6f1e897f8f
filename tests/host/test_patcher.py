"""The patcher keeps ComfyUI's contract: it tells the truth about memory and leaves the model as it found it."""

from __future__ import annotations

import gc

import comfy.model_management
import comfy.model_patcher
import pytest
import torch

from loras import apply, make_lora
from scripts.tiny_models import build_tiny_model, sample_tiny
from streamed import assert_same_weights, on_simulated_card, stream, weights_of

FAMILY = "flux"
HAS_DYNAMIC = pytest.mark.skipif(
    not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="this ComfyUI has no DynamicVRAM"
)

HAS_MULTI_GPU = pytest.mark.skipif(
    not hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu"), reason="this ComfyUI copies no models"
)


@pytest.fixture
def card(monkeypatch):
    on_simulated_card(monkeypatch, seed=11)


def test_the_unstreamed_branch_of_the_same_model_still_works(card, load, sample):
    model = load(FAMILY, size="tiny")
    before = weights_of(model)
    expected = sample(model)
    streamed = stream(model, 0.4)
    for _ in range(2):
        assert torch.equal(sample(streamed), expected)
        assert torch.equal(sample(model), expected)
    comfy.model_management.unload_all_models()
    assert_same_weights(model, before)


def test_two_nodes_on_one_model_share_its_host_memory(card, load, sample):
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    first, second = stream(model, 0.2), stream(model, 0.6)
    assert first.stream is second.stream
    assert torch.equal(sample(first), expected)
    host_bytes = first.stream.session.host_bytes
    assert torch.equal(sample(second), expected)
    assert torch.equal(sample(first), expected)
    assert first.stream.session.host_bytes == host_bytes


def test_sizes_are_truthful(card, load, sample):
    model = load(FAMILY, size="tiny")
    streamed = stream(model, 0.5)
    device = streamed.stream.device
    assert streamed.model_size() == model.model_size()
    assert streamed.loaded_size() == 0
    used = device.used_bytes
    sample(streamed)
    assert 0 < streamed.loaded_size() == device.used_bytes - used < streamed.model_size()
    assert streamed.current_loaded_device() == streamed.load_device
    streamed.detach()
    assert streamed.loaded_size() == 0
    assert device.used_bytes == used


def test_what_streams_rests_on_the_host_whatever_comfyui_does_with_the_model(card, load, sample):
    """With --highvram it leaves models on the card, where a second copy of the weights would have no room."""
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    model.offload_device = torch.device("meta")  # where weights would be lost
    assert torch.equal(sample(stream(model, 0.4)), expected)


def test_a_clone_streams_too_and_is_recognised(card, load, sample):
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    streamed = stream(model, 0.4)
    clone = streamed.clone()
    assert type(clone) is type(streamed) and clone.is_clone(streamed) and clone.is_clone(model)
    assert clone.settings == streamed.settings and clone.stream is streamed.stream
    assert torch.equal(sample(clone), expected)


def test_a_model_that_is_moved_to_the_processor_runs_there_unstreamed(monkeypatch, card, load, sample):
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    streamed = stream(model, 0.4)
    assert torch.equal(sample(streamed), expected)
    passes = streamed.stream.session.meter.passes
    with monkeypatch.context() as moved:
        moved.setattr(streamed.stream.device, "torch_device", torch.device("cuda"))  # the processor is what is left
        assert torch.equal(sample(streamed.clone()), expected)
        assert streamed.stream.device.used_bytes == 0
    assert torch.equal(sample(streamed), expected)
    assert streamed.stream.session.meter.passes == 2 * passes


@HAS_MULTI_GPU
def test_a_copy_for_another_card_is_comfyuis(card, load, sample):
    model = load(FAMILY, size="tiny")
    model.cached_patcher_init = (lambda **_: load(FAMILY, size="tiny"), ())
    expected = sample(model)
    streamed = stream(apply(model, make_lora(model, seed=3), 1.0), 0.4)
    changed = sample(streamed)
    copy = streamed.deepclone_multigpu(torch.device("cpu", 0))
    assert type(copy) is comfy.model_patcher.ModelPatcher and copy.model is not model.model
    assert torch.equal(sample(copy), changed) and not torch.equal(changed, expected)
    assert torch.equal(sample(streamed), changed)


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


def test_the_same_run_again_reads_and_locks_nothing(card, load, sample):
    model = load(FAMILY, size="tiny")
    streamed = stream(model, 0.5)
    first = sample(streamed)
    addresses = {name: tensor.data_ptr() for name, tensor in model.model.diffusion_model.state_dict().items()}
    locked = streamed.stream.device.locked_bytes
    assert torch.equal(sample(streamed), first)
    assert streamed.stream.device.locked_bytes == locked
    assert {n: t.data_ptr() for n, t in model.model.diffusion_model.state_dict().items()} == addresses


def test_nothing_of_ours_outlives_the_patchers(card, load, sample):
    model = load(FAMILY, size="tiny")
    before = weights_of(model)
    streamed = stream(model, 0.5)
    device = streamed.stream.device
    sample(streamed)
    assert device.used_bytes > 0 and device.locked_bytes > 0
    comfy.model_management.unload_all_models()
    del streamed
    gc.collect()
    assert device.used_bytes == 0 and device.locked_bytes == 0
    assert_same_weights(model, before)
    for module in model.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not hasattr(module, "prev_comfy_cast_weights")


def test_a_patcher_that_dies_while_loaded_leaves_a_model_that_works(card, load, sample):
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    streamed = stream(model, 0.5)
    device = streamed.stream.device
    sample(streamed)
    del streamed
    gc.collect()
    assert torch.equal(sample(model), expected)
    assert device.used_bytes == 0 and device.locked_bytes == 0


@pytest.mark.parametrize("is_dynamic", [False, pytest.param(True, marks=HAS_DYNAMIC)])
def test_weights_that_the_patcher_below_puts_back_are_loaded_again(card, load, sample, is_dynamic):
    """It stands in for a streamed one that is gone, as when a setting has changed, and is asked for memory."""
    model = load(FAMILY, size="tiny")
    model = apply(model, make_lora(model, seed=3), 1.0)
    expected = sample(model)
    first = stream(model, 0.6)
    assert torch.equal(sample(first), expected)
    second = stream(model, 0.6)
    assert second.stream is first.stream
    del first
    gc.collect()
    (entry,) = [entry for entry in comfy.model_management.current_loaded_models if entry.model is model]
    if is_dynamic:
        comfy.model_patcher.ModelPatcherDynamic.restore_loaded_backups(model)
    else:
        entry.model_unload(model.loaded_size() // 3)
    assert torch.equal(sample(second), expected)
    second.stream.session.check()


def test_layers_cast_while_their_weights_are_in_ram_and_not_while_they_are_on_the_card(card):
    model = build_tiny_model(FAMILY, dtype=torch.float32)  # on a processor other weights are always cast
    expected = sample_tiny(model, FAMILY)
    streamed = stream(model, 0.3)
    result, seen = seen_casting(streamed)
    assert torch.equal(result, expected)
    assert len(seen) > 10 and not any(seen.values())
    moving = streamed.stream.session.moving_modules()
    layers = [module for module in model.model.modules() if hasattr(module, "comfy_cast_weights")]
    assert {module.comfy_cast_weights for module in layers if module in moving} == {True}
    assert {module.comfy_cast_weights for module in layers if module not in moving} == {False}


def test_layers_that_are_told_to_cast_do_so_on_the_card_too(card):
    """Weights in another type than ComfyUI is told to compute in."""
    model = build_tiny_model(FAMILY, dtype=torch.float32)
    told = model.clone()
    told.set_model_compute_dtype(torch.bfloat16)
    expected = sample_tiny(told, FAMILY)
    assert not torch.equal(expected, sample_tiny(model, FAMILY))
    result, seen = seen_casting(stream(told, 0.3))
    assert torch.equal(result, expected)
    assert all(seen.values())


def seen_casting(streamed) -> tuple[torch.Tensor, dict[torch.nn.Module, bool]]:
    """Sample, and give which linear layers cast as they ran."""
    seen, handles = {}, []
    for module in streamed.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            note = module.register_forward_pre_hook(lambda module, _: seen.update({module: module.comfy_cast_weights}))
            handles.append(note)
    result = sample_tiny(streamed, FAMILY)
    for handle in handles:
        handle.remove()
    return result, seen
