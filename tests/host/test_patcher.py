"""The patcher keeps ComfyUI's contract: it tells the truth about memory and leaves the model as it found it."""

from __future__ import annotations

import gc

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from layerstream.streaming.host import ledger
from layerstream.streaming.host import patcher as patcher_module
from layerstream.streaming.host.ledger import write_ledger

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


def test_the_same_run_again_reads_and_locks_nothing(card, load, sample):
    model = load(FAMILY, size="tiny")
    streamed = stream(model, 0.5)
    first = sample(streamed)
    addresses = {name: tensor.data_ptr() for name, tensor in model.model.diffusion_model.state_dict().items()}
    locked = streamed.stream.device.locked_bytes
    assert torch.equal(sample(streamed), first)
    assert streamed.stream.device.locked_bytes == locked
    assert {n: t.data_ptr() for n, t in model.model.diffusion_model.state_dict().items()} == addresses


def test_the_same_run_again_leaves_the_model_as_it_is(monkeypatch, card, load, sample):
    written = []

    def write_and_note(patcher) -> None:
        written.append(patcher)
        write_ledger(patcher)

    for module in (ledger, patcher_module):
        monkeypatch.setattr(module, "write_ledger", write_and_note)
    model = load(FAMILY, size="tiny")
    expected = sample(model)
    lora = apply(model, make_lora(model, seed=1), 1.0)
    expected_with_lora = sample(lora)
    assert not torch.equal(expected, expected_with_lora)
    streamed, streamed_with_lora = stream(model, 0.4), stream(lora, 0.4)
    for patcher, result in ((streamed, expected), (streamed_with_lora, expected_with_lora), (streamed, expected)):
        written.clear()
        assert torch.equal(sample(patcher), result) and written
        written.clear()
        assert torch.equal(sample(patcher), result) and not written
    assert torch.equal(sample(model), expected) and not written
    assert torch.equal(sample(streamed), expected) and written, "the model was somebody else's"
    written.clear()
    streamed.force_cast_weights = True
    assert torch.equal(sample(streamed), expected) and written
    written.clear()
    streamed.partially_unload(streamed.offload_device, streamed.loaded_size() // 4)
    assert torch.equal(sample(streamed), expected) and written, "part of it had left the card"


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
