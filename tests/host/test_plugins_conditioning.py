"""What comes with conditioning and latent of a streamed model: regions, masks, references, windows of frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from plugged import assert_equal_streamed, node
from scripts.model_configurations import MODELS, Random
from scripts.tiny_models import is_newer_host


def values(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def left_half(side: int) -> torch.Tensor:
    mask = torch.zeros(1, side, side)
    mask[:, :, : side // 2] = 1.0
    return mask


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_regional_conditioning(name):
    """An area, a mask and a span of steps: several forward passes a step, of differing sizes."""
    side = MODELS[name].latent[-1]

    def change(positive, negative):
        other = [[condition.flip(1), entries] for condition, entries in positive]
        pixels = {"width": side * 4, "height": side * 8, "x": side * 4, "y": 0}
        area = node("nodes", "ConditioningSetArea", conditioning=positive, strength=1.0, **pixels)[0]
        masked = {"mask": left_half(side * 8), "set_cond_area": "mask bounds", "strength": 0.8}
        region = node("nodes", "ConditioningSetMask", conditioning=other, **masked)[0]
        late = node("nodes", "ConditioningSetTimestepRange", conditioning=other, start=0.4, end=1.0)[0]
        return area + region + late + positive, negative

    assert_equal_streamed(name, change=change, steps=3)


@pytest.mark.parametrize(("name", "shape"), [("flux", (1, 16, 8, 8)), ("qwen-image", (1, 16, 1, 8, 8))])
def test_reference_latents(name, shape):
    """As FLUX Kontext and Qwen-Image-Edit get them: the sequence is longer than the image."""

    def change(positive, negative):
        for seed in (1, 2):
            latent = {"samples": values(*shape, seed=seed)}
            positive = node("nodes_edit_model", "ReferenceLatent", conditioning=positive, latent=latent)[0]
        return positive, negative

    assert_equal_streamed(name, change=change)


def test_an_inpaint_model(monkeypatch):
    """Nine channels in, five of them the masked image and its mask."""
    plain = MODELS["sd15"]
    inputs = {"concat_latent_image": Random((4, 16, 16)), "concat_mask": Random((1, 16, 16))}
    inpaint = replace(plain, full={**plain.full, "in_channels": 9}, inputs=inputs)
    monkeypatch.setitem(MODELS, "sd15-inpaint", inpaint)
    other = {"concat_latent_image": values(1, 4, 16, 16), "concat_mask": left_half(16)[None]}

    def change(positive, negative):
        return [[condition, {**entries, **other}] for condition, entries in positive], negative

    assert_equal_streamed("sd15-inpaint", change=change)


def test_a_mask_of_several_strengths():
    """Differential diffusion: which part of the latent is free changes with every step."""
    shape = MODELS["zimage"].latent
    mask = torch.linspace(0, 1, shape[-1]).expand(1, 1, *shape[-2:])
    latent = {"samples": values(1, *shape), "noise_mask": mask}

    def patch(model):
        return node("nodes_differential_diffusion", "DifferentialDiffusion", model=model, strength=0.9)[0]

    assert_equal_streamed("zimage", patch, latent=latent, steps=3, denoise=0.8)


WINDOWS: dict[str, Any] = {
    "context_length": 4,
    "context_overlap": 2,
    "context_schedule": "standard_uniform",
    "context_stride": 1,
    "closed_loop": False,
    "fuse_method": "pyramid",
    "dim": 2,
}


@pytest.mark.parametrize("name", ["wan21-t2v", "ltxv"])
def test_context_windows(name):
    """Several passes a step, each over some of the frames."""
    channels, _, *sides = MODELS[name].latent
    values = {**WINDOWS, "freenoise": False} if is_newer_host() else WINDOWS

    def patch(model):
        return node("nodes_context_windows", "ContextWindowsManualNode", model=model, **values)[0]

    assert_equal_streamed(name, patch, latent={"samples": torch.zeros(1, channels, 7, *sides)})


@pytest.mark.parametrize("name", ["wan21-i2v", "wan22-i2v"])
def test_two_videos_from_images(name):
    """Image and mask lie beside the noise as channels, with guidance and two videos at once."""
    shape = MODELS[name].latent
    other = {"concat_latent_image": values(1, *shape)}

    def change(positive, negative):
        return [[condition, {**entries, **other}] for condition, entries in positive], negative

    assert_equal_streamed(name, change=change, latent={"samples": torch.zeros(2, *shape)})
