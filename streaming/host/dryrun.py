"""The forward of each stage as a function of its own, for playing it through on tensors without values.

In: a component and the shapes of its work. Out: `Work`, which calls ComfyUI's own code as ComfyUI does and makes its
inputs itself, so that it runs on real tensors as well as on fake ones. Nothing is counted or moved here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.samplers
import torch


class Work(NamedTuple):
    """One forward of a stage: the module whose weights it uses, a function that runs it, and where."""

    module: torch.nn.Module
    run: Callable[[], None]
    device: torch.device


def decode(vae: Any, shape: Sequence[int]) -> Work:
    """Decoding one image, or one video, as large as those of a batch of latents [batch, channels, ...]."""
    model = vae.first_stage_model

    def run() -> None:
        samples = torch.empty(1, *shape[1:], dtype=vae.vae_dtype, device=vae.device)
        if getattr(model, "comfy_has_chunked_io", False):
            model.decode(samples, output_buffer=torch.empty(model.decode_output_shape(samples.shape)))
        else:
            model.decode(samples)

    return Work(model, run, vae.device)


def encode(vae: Any, shape: Sequence[int]) -> Work:
    """Encoding one image, or one video, of a batch of pixels [batch, channels, ...]."""
    model = vae.first_stage_model

    def run() -> None:
        if getattr(model, "comfy_has_chunked_io", False):
            model.encode(torch.empty(1, *shape[1:], dtype=vae.vae_dtype), device=vae.device)
        else:
            model.encode(torch.empty(1, *shape[1:], dtype=vae.vae_dtype, device=vae.device))

    return Work(model, run, vae.device)


def encode_text(clip: Any, tokens: Any) -> Work:
    model, device = clip.cond_stage_model, clip.patcher.load_device

    def run() -> None:
        model.reset_clip_options()
        model.set_clip_options({"execution_device": device})
        model.encode_token_weights(tokens)

    return Work(model, run, device)


def sample(patcher: Any, noise_shape: Sequence[int], conds: dict[str, list[Any]], is_guided: bool) -> Work:
    """One call of the model, of both halves of a batch where ComfyUI would put them together."""
    if any("control" in cond or "hooks" in cond for entries in conds.values() for cond in entries):
        raise NotImplementedError("control nets and scheduled hooks keep state that a dry run would disturb")
    model, device = patcher.model, patcher.load_device

    def run() -> None:
        noise = torch.empty(tuple(noise_shape), device=device)
        sigma = torch.ones(noise_shape[0], device=device)
        copies = {name: [cond.copy() for cond in entries] for name, entries in conds.items()}
        processed = comfy.samplers.process_conds(model, noise, copies, device, latent_image=noise, seed=0)
        found = [
            comfy.samplers.get_area_and_mult(cond, noise, sigma) for entries in processed.values() for cond in entries
        ]
        pieces = [piece for piece in found if piece is not None]
        if is_guided:
            pieces = [piece for piece in pieces if comfy.samplers.can_concat_cond(piece, pieces[0])]
        else:
            pieces = pieces[:1]
        conditioning = comfy.samplers.cond_cat([piece.conditioning for piece in pieces])
        conditioning["transformer_options"] = {
            "cond_or_uncond": list(range(len(pieces))),
            "uuids": [piece.uuid for piece in pieces],
            "sigmas": sigma,
        }
        model.apply_model(
            torch.cat([piece.input_x for piece in pieces]), torch.cat([sigma] * len(pieces)), **conditioning
        )

    return Work(model, run, device)
