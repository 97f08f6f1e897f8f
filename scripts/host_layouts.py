"""The tensors of model files as the open ComfyUI's own classes have them: diffusion models, checkpoints, autoencoders.

In: a name of `model_configurations` and settings that make it narrow. Out: what `random_file` writes. Keys are those
under which ComfyUI itself saves, so that its own detection and loaders take the file; they are the published ones but
for FLUX.2's norms in newer hosts, which `published` renames.
A host must be open (`hosts.open_host`) before anything here is called; nothing here holds values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .layouts.tensors import BIAS_SPREAD, GAIN_SPREAD, TensorLayout
from .model_configurations import MODELS
from .model_configurations.model import Settings
from .tiny_models import is_newer_host

Module = torch.nn.Module

GAIN_ENDINGS = (".gamma", ".scale", "running_var", "std-of-means")
"""Beside the weights of norms, what multiplies: values lie around one."""
# In Stable Cascade's blocks these make factors of all that has gone through: the product of some hundred has to stay
# of order one too.
FACTOR_ENDINGS = (".mapper.weight", ".mapper_sca.weight", ".mapper_crp.weight")
FACTOR_GAIN = 0.05
NOT_STORED = ("position_ids", "num_batches_tracked")
# ComfyUI always builds CLIP-G's 32 layers. Those without values pass on what they get, and are holes of the file.
CLIP_G_EMPTY = tuple(f"{kind}.{index}." for kind in ("layers", "resblocks") for index in range(1, 31))


def diffusion_model(name: str, settings: Settings) -> list[TensorLayout]:
    """A file with the diffusion model of `name` alone, its published settings replaced by `settings`."""
    return _tensors(_host_model(name, settings).diffusion_model.state_dict())


def checkpoint(
    name: str, settings: Settings, *, has_text_encoder: bool, autoencoder: Callable[[], Module] | None
) -> list[TensorLayout]:
    """A file with the diffusion model of `name`, and its text encoder and an autoencoder where it has them."""
    model = _host_model(name, settings)
    host = model.model_config
    weights = host.process_unet_state_dict_for_saving(model.diffusion_model.state_dict())
    if has_text_encoder:
        encoder = host.clip_target().clip(device="meta", dtype=torch.float32, model_options={})
        weights |= host.process_clip_state_dict_for_saving(encoder.state_dict())
    if autoencoder is not None:
        weights |= host.process_vae_state_dict_for_saving(_without_values(autoencoder).state_dict())
    return _tensors(weights)


def autoencoder_file(autoencoder: Callable[[], Module]) -> list[TensorLayout]:
    """A file with an autoencoder alone."""
    return _tensors(_without_values(autoencoder).state_dict())


def image_autoencoder(*, latent_channels: int, is_projected: bool = True, is_normalised: bool = False) -> Module:
    """The image autoencoder of the Stable Diffusion and FLUX families, whose widths ComfyUI fixes.

    FLUX.1 and SD3.5 do without the projections between encoder, latent and decoder; FLUX.2 normalises the latent.
    """
    from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine

    settings = {
        "double_z": True,
        "z_channels": latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    if is_projected:
        return AutoencoderKL(ddconfig={**settings, "batch_norm_latent": is_normalised}, embed_dim=latent_channels)
    parts = "comfy.ldm.modules.diffusionmodules.model"
    return AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{parts}.Encoder", "params": settings},
        decoder_config={"target": f"{parts}.Decoder", "params": settings},
    )


def wan_autoencoder() -> Module:
    """The autoencoder of WAN 2.1 and Qwen-Image at a third of its width, which ComfyUI reads from the file."""
    from comfy.ldm.wan.vae import WanVAE

    return WanVAE(
        dim=32,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )


def ltx_autoencoder(settings: Settings) -> Module:
    """LTX Video's autoencoder; files name its settings in their metadata."""
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    return VideoVAE(config=settings)


def stage_a() -> Module:
    """Stable Cascade's last stage, small as it is."""
    from comfy.ldm.cascade.stage_a import StageA

    return StageA()


def _host_model(name: str, settings: Settings) -> Any:
    """ComfyUI's model of `name` without values, with `settings` in place of published ones."""
    import comfy.supported_models

    model = MODELS[name]
    published = model.settings(narrow=False, is_newer=is_newer_host())
    host = getattr(comfy.supported_models, model.supported)({**published, **settings})
    host.set_inference_dtype(torch.float32, None)
    return host.get_model({}, "", device=torch.device("meta"))


def _without_values(build: Callable[[], Module]) -> Module:
    with torch.device("meta"):
        return build()


def _tensors(weights: dict[str, torch.Tensor]) -> list[TensorLayout]:
    return [_tensor(name, tuple(weight.shape)) for name, weight in weights.items() if not name.endswith(NOT_STORED)]


def _tensor(name: str, shape: tuple[int, ...]) -> TensorLayout:
    """Random values that keep activations of order one: matrices by what they sum over, gains around one."""
    is_clip_g = "clip_g." in name or "embedders.1." in name
    if is_clip_g and any(part in name for part in CLIP_G_EMPTY):
        return TensorLayout(name, shape, 0.0, 0.0)
    if name.endswith(GAIN_ENDINGS) or (len(shape) == 1 and name.endswith(".weight")):
        return TensorLayout(name, shape, 1.0, GAIN_SPREAD)
    if len(shape) > 1:
        gain = FACTOR_GAIN if "_blocks." in name and name.endswith(FACTOR_ENDINGS) else 1.0
        return TensorLayout(name, shape, 0.0, gain / math.sqrt(math.prod(shape[1:])))
    return TensorLayout(name, shape, 0.0, BIAS_SPREAD)
