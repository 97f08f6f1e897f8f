"""What is saved of a streamed model is what is saved of the resident one: patched once, by whichever way it streams."""

from __future__ import annotations

import pytest
import torch

from loras import apply, make_lora
from saving import assert_same, saved
from streamed import on_simulated_card, stream


def patched(model, lora):
    """With a LoRA, and where the model has a weight beside other modules, a change that ComfyUI never applies."""
    model = apply(model, lora, 0.8)
    for name, tensor in model.model.state_dict().items():
        if name.endswith("pad_token"):
            model.add_patches({name: ("diff", (torch.ones_like(tensor),))}, 0.5)
    return model


@pytest.mark.parametrize("is_packed", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.parametrize("family", ["flux", "zimage"])
def test_a_patched_model_is_saved_patched(monkeypatch, load, sample, tmp_path, family, kept, is_packed):
    on_simulated_card(monkeypatch, seed=5, is_packed=is_packed)
    model = load(family, size="tiny")
    lora = make_lora(model, seed=1)
    expected_image = sample(patched(model, lora))
    expected = saved(patched(model, lora), tmp_path / "resident.safetensors")
    plain = saved(model, tmp_path / "plain.safetensors")
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in expected.items())

    streamed = patched(stream(model, kept), lora)
    assert torch.equal(sample(streamed), expected_image)
    assert streamed.stream.session.is_packed == is_packed
    assert_same(saved(streamed, tmp_path / "streamed.safetensors"), expected)
    assert torch.equal(sample(streamed), expected_image)
    streamed.detach()
    assert_same(saved(patched(stream(model, kept), lora), tmp_path / "unsampled.safetensors"), expected)
    assert_same(saved(model, tmp_path / "after.safetensors"), plain)
