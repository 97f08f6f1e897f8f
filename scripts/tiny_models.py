"""Builds models of a supported family that are too small for ComfyUI's file detection, with random weights.

Real widths make one pass take seconds on a processor. These models are ComfyUI's own classes with a smaller
configuration, so a pass takes milliseconds; they serve tests of many cases, while narrow files test the loading. A
host must be open (`hosts.open_host`) before anything here is called.
"""

import math
from typing import Any

import torch

from .checkpoints import Family

TINY_CONFIGURATIONS: dict[Family, dict[str, Any]] = {
    "zimage": {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 256,
        "cap_feat_dim": 64,
        "n_layers": 6,
        "qk_norm": True,
        "n_heads": 2,
        "n_kv_heads": 2,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    },
    "flux": {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "vec_in_dim": 768,
        "context_in_dim": 64,
        "hidden_size": 256,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 4,
        "depth_single_blocks": 8,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
    },
}
# ComfyUI 0.3.75 refuses these, 0.33 requires them.
NEWER_FLUX_CONFIGURATION: dict[str, Any] = {"txt_ids_dims": [], "yak_mlp": False, "txt_norm": False}


def build_tiny_model(family: Family, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A model patcher around a tiny model of `family`: ten blocks (Z-Image) or twelve (FLUX), weights in `dtype`.

    Computes in float32, as ComfyUI does with bfloat16 weights on a processor.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    configuration = dict(TINY_CONFIGURATIONS[family])
    classes = {"zimage": comfy.supported_models.ZImage, "flux": comfy.supported_models.Flux}
    if family == "flux" and _is_newer_flux():
        configuration.update(NEWER_FLUX_CONFIGURATION)
    model_config = classes[family](configuration)
    model_config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    model = model_config.get_model({}, "")
    _fill(model.diffusion_model, seed)
    # Newer versions choose between patcher classes at start and name the choice; older ones have only one.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher_class(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _is_newer_flux() -> bool:
    import comfy.ldm.flux.model

    return "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__


def _fill(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter random values that keep activations of order one; none is constant."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values /= math.sqrt(parameter.shape[-1])
        elif "norm" in name:
            values = 1 + 0.1 * values
        else:
            values *= 0.05
        parameter.data.copy_(values)
