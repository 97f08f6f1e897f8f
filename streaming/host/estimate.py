"""How much of the card a stage needs besides weights.

In: a component and the shape of its work. Out: bytes. ComfyUI's own numbers, taken from where ComfyUI itself takes
them; a component for which it has none needs nothing that is known.
"""

from __future__ import annotations

from typing import Any

import comfy.sampler_helpers
import torch


def decode_shape(vae: Any, samples: torch.Tensor) -> torch.Size:
    """The shape that ComfyUI decodes, of a latent as a node passes it."""
    if vae.latent_dim == 2 and samples.ndim == 5:
        return samples[:, :, 0].shape
    return samples.shape


def encode_shape(vae: Any, pixels: torch.Tensor) -> torch.Size:
    """The shape that ComfyUI encodes, channels first, of images as a node passes them."""
    cropped = vae.vae_encode_crop_pixels(pixels).movedim(-1, 1)
    if vae.latent_dim == 3 and cropped.ndim < 5:
        cropped = cropped.unsqueeze(2) if getattr(vae, "not_video", False) else cropped.movedim(1, 0).unsqueeze(0)
    return cropped.shape


def decode_bytes(vae: Any, samples: torch.Tensor) -> int:
    return int(vae.memory_used_decode(decode_shape(vae, samples), vae.vae_dtype))


def encode_bytes(vae: Any, pixels: torch.Tensor) -> int:
    return int(vae.memory_used_encode(encode_shape(vae, pixels), vae.vae_dtype))


def text_bytes(clip: Any, tokens: Any) -> int:
    """What ComfyUI 0.33 says of some encoders; 0.3.75 and the others count on what ComfyUI always leaves free."""
    function = getattr(clip.cond_stage_model, "memory_estimation_function", None)
    return int(function(tokens, device=clip.patcher.load_device)) if function else 0


def sampling_bytes(model: Any, noise_shape: Any, conds: Any, is_guided: bool) -> int:
    both, single = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)
    return int(both if is_guided else single)
