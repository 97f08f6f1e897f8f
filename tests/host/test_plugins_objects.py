"""Packs that put objects of their own into a streamed model: a block within a block, a forward in place of another."""

from __future__ import annotations

import types

import torch

from loras import apply, make_lora
from plugged import assert_equal_streamed, assert_streams_as, sample, stream_all, stream_half
from scripts.division import narrow_units
from scripts.family_matrix import simulated_card
from scripts.tiny_models import build_tiny_model

PLACE = "diffusion_model.single_blocks.1"


class Around(torch.nn.Module):
    """A block of a pack's own, which holds the model's and calls it."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return self.block(*args, **kwargs) * 1.1


def with_block_around(model):
    patched = model.clone()
    patched.add_object_patch(PLACE, Around(patched.get_model_object(PLACE)))
    return patched


def with_other_forward(model):
    patched = model.clone()
    block = patched.get_model_object(PLACE)

    def forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs) * 1.1

    patched.add_object_patch(f"{PLACE}.forward", types.MethodType(forward, block))
    return patched


def test_a_block_within_a_block():
    assert_equal_streamed("flux", with_block_around)


def test_a_forward_of_a_packs_own():
    assert_equal_streamed("flux", with_other_forward)


def test_loras_find_their_weights_whoever_loads_first():
    """Under the pack's block a weight has another name, which must not stay with the streamed model."""
    with narrow_units(), torch.inference_mode(), simulated_card(0):
        model = build_tiny_model("flux")
        streamed = stream_half(model)
        lora = make_lora(model, seed=1)
        # ComfyUI looks for a LoRA's weights in the model as it then is, so all branches are made before any is loaded.
        resident, moving = apply(model, lora, 0.8), apply(streamed, lora, 0.8)
        around = with_block_around(streamed)
        expected, expected_around = sample(resident, "flux"), sample(with_block_around(model), "flux")
        for _ in range(2):
            assert_streams_as(around, expected_around, "flux")
            assert_streams_as(moving, expected, "flux")
        assert torch.equal(sample(resident, "flux"), expected)


def test_a_lora_and_a_block_within_a_block():
    with narrow_units(), torch.inference_mode(), simulated_card(0):
        model = build_tiny_model("flux")
        lora = make_lora(model, seed=1)
        expected = sample(apply(with_block_around(model), lora, 0.8), "flux")
        assert_streams_as(apply(with_block_around(stream_all(model)), lora, 0.8), expected, "flux")
