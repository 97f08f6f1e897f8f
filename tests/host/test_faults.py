"""A fault loses nothing: the run after it is right and no memory, hook or lock is left behind."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from streamed import on_simulated_card, stream

ERRORS = (RuntimeError, torch.OutOfMemoryError, comfy.model_management.InterruptProcessingException)


def hook_count(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("place", ["double_blocks.0.img_mlp", "single_blocks.5.linear2", "final_layer.linear"])
def test_the_run_after_a_fault_is_right_and_nothing_leaks(monkeypatch, load, sample, error, place):
    model = load("flux", size="tiny")
    expected = sample(model)
    on_simulated_card(monkeypatch, seed=2)
    streamed = stream(model, 0.5)
    device = streamed.stream.device
    assert torch.equal(sample(streamed), expected)
    held = device.used_bytes, device.locked_bytes, hook_count(model)

    def fail(*_):
        raise error("here")

    handle = model.model.diffusion_model.get_submodule(place).register_forward_hook(fail)
    with pytest.raises(error):
        sample(streamed)
    handle.remove()
    is_tried_again = error is torch.OutOfMemoryError  # with less each time, so the plan is another one afterwards
    assert is_tried_again or (device.used_bytes, device.locked_bytes, hook_count(model)) == held
    streamed.stream.session.check()
    assert torch.equal(sample(streamed), expected)
    assert streamed.streaming_report()["broken_passes"] == (5 if is_tried_again else 1)
    assert (device.used_bytes, device.locked_bytes, hook_count(model)) == held


def test_out_of_memory_while_loading_is_met_with_a_smaller_plan(monkeypatch, load, sample):
    model = load("flux", size="tiny")
    expected = sample(model)
    on_simulated_card(monkeypatch, seed=3, size_gib=0.25)
    streamed = stream(model, 0.9)
    device = streamed.stream.device
    hog = device.allocate(device.free_bytes() - streamed.model_size() // 2)
    with monkeypatch.context() as patched:
        patched.setattr(device, "free_bytes", lambda: device.budget_bytes)  # a neighbour that nobody foresaw
        assert torch.equal(sample(streamed), expected)
    assert streamed.streaming_report()["rungs"]
    assert device.used_bytes - hog.nbytes <= streamed.model_size() // 2
    streamed.detach()
    assert device.used_bytes == hog.nbytes
    del hog
    assert torch.equal(sample(streamed), expected)
    assert torch.equal(sample(model), expected)
