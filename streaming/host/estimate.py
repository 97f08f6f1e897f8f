"""How much of the card a stage needs besides weights.

In: a component and its work. Out: bytes. By formula these are ComfyUI's own numbers, taken from where ComfyUI itself
takes them; by dry run they are found once for each shape and remembered for as long as the model lives. Where a dry run
cannot be made, the log says why and the formula stands in.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import comfy.sampler_helpers
import torch

from ..engine.live_bytes import peak_of
from . import dryrun
from .policy import Estimation

logger = logging.getLogger("layerstream")


def decode_bytes(vae: Any, samples: torch.Tensor, estimation: Estimation = Estimation.FORMULA) -> int:
    return _vae_bytes("decode", vae, _decode_shape(vae, samples), dryrun.decode, vae.memory_used_decode, estimation)


def encode_bytes(vae: Any, pixels: torch.Tensor, estimation: Estimation = Estimation.FORMULA) -> int:
    return _vae_bytes("encode", vae, _encode_shape(vae, pixels), dryrun.encode, vae.memory_used_encode, estimation)


def text_bytes(clip: Any, tokens: Any, estimation: Estimation = Estimation.FORMULA) -> int:
    """For the formula, what ComfyUI 0.33 says of some encoders; of others it says nothing."""
    function = getattr(clip.cond_stage_model, "memory_estimation_function", None)
    return _estimate(
        estimation,
        clip.cond_stage_model,
        ("text", token_shape(tokens)),
        lambda: dryrun.encode_text(clip, tokens),
        lambda: function(tokens, device=clip.patcher.load_device) if function else 0,
    )


def sampling_bytes(
    patcher: Any,
    noise_shape: Sequence[int],
    conds: dict[str, list[Any]],
    is_guided: bool,
    estimation: Estimation = Estimation.FORMULA,
) -> int:
    def formula() -> int:
        both, single = comfy.sampler_helpers.estimate_memory(patcher, noise_shape, conds)
        return both if is_guided else single

    shapes = tuple(
        (name, key, tuple(value.shape))
        for name, entries in conds.items()
        for cond in entries
        for key, value in cond.items()
        if isinstance(value, torch.Tensor)
    )
    return _estimate(
        estimation,
        patcher.model,
        ("sampling", tuple(noise_shape), is_guided, shapes),
        lambda: dryrun.sample(patcher, noise_shape, conds, is_guided),
        formula,
    )


def token_shape(tokens: Any) -> Hashable:
    """What of tokens decides how much memory encoding takes."""
    if isinstance(tokens, dict):
        return tuple((key, token_shape(value)) for key, value in tokens.items())
    return tuple(len(row) for row in tokens if isinstance(row, list)) if isinstance(tokens, list) else None


def token_count(tokens: Any) -> int:
    """How many tokens there are, of all encoders together."""
    if isinstance(tokens, dict):
        return sum(map(token_count, tokens.values()))
    return sum(len(row) for row in tokens if isinstance(row, list)) if isinstance(tokens, list) else 0


# What dry runs found, None where one could not be made.
_found: weakref.WeakKeyDictionary[torch.nn.Module, dict[Hashable, int | None]] = weakref.WeakKeyDictionary()


def _estimate(
    estimation: Estimation,
    model: torch.nn.Module,
    work: tuple[Hashable, ...],
    prepare: Callable[[], dryrun.Work],
    formula: Callable[[], float],
) -> int:
    if estimation is Estimation.FORMULA:
        return int(formula())
    found = _found.setdefault(model, {})
    if work not in found:
        try:
            found[work] = peak_of(*prepare())
        except Exception as reason:  # what is played through is anybody's code
            found[work] = None
            logger.warning(
                "LayerStream: no dry run of %s of %s, so ComfyUI's formula is used: %s: %s",
                work[0],
                type(model).__name__,
                type(reason).__name__,
                str(reason).partition("\n")[0],
            )
    size_bytes = found[work]
    return int(formula()) if size_bytes is None else size_bytes


def _vae_bytes(
    kind: str,
    vae: Any,
    shape: torch.Size,
    prepare: Callable[[Any, torch.Size], dryrun.Work],
    formula: Callable[[torch.Size, torch.dtype], float],
    estimation: Estimation,
) -> int:
    """What work of `kind` on an input of `shape` needs; `formula` is ComfyUI's."""
    return _estimate(
        estimation,
        vae.first_stage_model,
        (kind, tuple(shape[1:]), vae.vae_dtype),
        lambda: prepare(vae, shape),
        lambda: formula(shape, vae.vae_dtype),
    )


def _decode_shape(vae: Any, samples: torch.Tensor) -> torch.Size:
    """The shape that ComfyUI decodes, of a latent as a node passes it."""
    if vae.latent_dim == 2 and samples.ndim == 5:
        return samples[:, :, 0].shape
    return samples.shape


def _encode_shape(vae: Any, pixels: torch.Tensor) -> torch.Size:
    """The shape that ComfyUI encodes, channels first, of images as a node passes them."""
    cropped = vae.vae_encode_crop_pixels(pixels).movedim(-1, 1)
    if vae.latent_dim == 3 and cropped.ndim < 5:
        cropped = cropped.unsqueeze(2) if getattr(vae, "not_video", False) else cropped.movedim(1, 0).unsqueeze(0)
    return cropped.shape
