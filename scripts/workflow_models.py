"""The files that each example workflow loads, with few and thin layers and random values.

Out: for a workflow, its files by their place under a models folder, written on the first request. Names are the
published ones. What ComfyUI fixes stays as wide as it is: FLUX.1, Z-Image and Qwen-Image, whose layouts are written
down; Stable Cascade, of which the lite variants are taken; CLIP. T5, UMT5, Qwen2.5-VL, Qwen3 and Mistral have their
depth fixed too, at billions of parameters: a CLIP-L lies in their place, which ComfyUI's loaders accept.

A host must be open (`hosts.open_host`) before anything here is called.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import checkpoint_cache, host_layouts
from .checkpoint_cache import cached, workflow_models
from .layouts.components import CLIP_L_WIDTH
from .layouts.tensors import TensorLayout
from .model_configurations.model import Settings
from .random_file import write_random_file
from .tiny_models import is_newer_host

T5_WIDTH = 4096

LTX_AUTOENCODER: Settings = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "encoder_base_channels": 32,
    "decoder_base_channels": 32,
    "encoder_blocks": [["compress_all", {}]] * 3 + [["res_x", {"num_layers": 1}]],
    "decoder_blocks": [["compress_all", {}]] * 3 + [["res_x", {"num_layers": 1}]],
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "causal_decoder": False,
    "timestep_conditioning": False,
}
"""What published files of LTX Video say of their autoencoder, with fewer and thinner layers."""

SD35_WIDTH = 512
SD35: Settings = {
    # ComfyUI takes the depth to be the width over 64.
    "depth": SD35_WIDTH // 64,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": T5_WIDTH, "out_features": SD35_WIDTH},
    },
    "num_patches": 32 * 32,
    "pos_embed_max_size": 32,
}
LTX: Settings = {"num_layers": 4, "attention_head_dim": 32, "cross_attention_dim": 32 * 32}
WAN: Settings = {"dim": 512, "num_heads": 4, "ffn_dim": 2048, "num_layers": 4}
FLUX2: Settings = {
    "context_in_dim": CLIP_L_WIDTH,
    "hidden_size": 1024,
    "num_heads": 8,
    "depth": 1,
    "depth_single_blocks": 4,
}
# Before that, ComfyUI took FLUX.2 to have 48 heads of 128.
FLUX2_WIDE: Settings = {"context_in_dim": CLIP_L_WIDTH, "depth": 1, "depth_single_blocks": 1}
CASCADE_C: Settings = {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]}
CASCADE_B: Settings = {
    "c_hidden": [320, 576, 1152, 1152],
    "nhead": [-1, 9, 18, 18],
    "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
}

Files = dict[str, Path]


def zimage() -> Files:
    return workflow_models()


def flux1() -> Files:
    return {
        "diffusion_models/flux1-dev.safetensors": checkpoint_cache.diffusion_model("flux", double=1, single=1),
        "text_encoders/clip_l.safetensors": _clip_l(),
        "text_encoders/t5xxl_fp16.safetensors": _clip_l(),
        "vae/ae.safetensors": checkpoint_cache.vae("zimage"),
    }


def flux2() -> Files:
    return {
        "diffusion_models/flux2_dev_fp8mixed.safetensors": _diffusion_model(
            "flux2", FLUX2 if is_newer_host() else FLUX2_WIDE
        ),
        "text_encoders/mistral_3_small_flux2_bf16.safetensors": _clip_l(),
        "vae/flux2-vae.safetensors": _vae(
            "flux2", lambda: host_layouts.image_autoencoder(latent_channels=32, is_normalised=True)
        ),
    }


def qwen_image() -> Files:
    return {
        "diffusion_models/qwen_image_bf16.safetensors": checkpoint_cache.diffusion_model("qwen-image", layers=1),
        "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors": _clip_l(),
        "vae/qwen_image_vae.safetensors": _vae("wan", host_layouts.wan_autoencoder),
    }


def sd35_large() -> Files:
    autoencoder = functools.partial(host_layouts.image_autoencoder, latent_channels=16, is_projected=False)
    return {
        "checkpoints/sd3.5_large.safetensors": _checkpoint("sd35-large", SD35, autoencoder=autoencoder),
        "text_encoders/clip_l.safetensors": _clip_l(),
        "text_encoders/clip_g.safetensors": _clip_l(),
        "text_encoders/t5xxl_fp16.safetensors": _clip_l(),
    }


def ltx_video() -> Files:
    return {
        "checkpoints/ltx-video-2b-v0.9.5.safetensors": _checkpoint(
            "ltxv",
            LTX,
            autoencoder=lambda: host_layouts.ltx_autoencoder(LTX_AUTOENCODER),
            metadata={"vae": LTX_AUTOENCODER},
        ),
        "text_encoders/t5xxl_fp16.safetensors": _clip_l(),
    }


def sdxl() -> Files:
    return {"checkpoints/sd_xl_base_1.0.safetensors": _unet_checkpoint("sdxl", {"channel_mult": [1, 1, 1]})}


def sd15() -> Files:
    return {"checkpoints/v1-5-pruned-emaonly-fp16.safetensors": _unet_checkpoint("sd15", {"channel_mult": [1] * 4})}


def stable_cascade() -> Files:
    return {
        "checkpoints/stable_cascade_stage_c.safetensors": _checkpoint("cascade-c", CASCADE_C, has_text_encoder=True),
        "checkpoints/stable_cascade_stage_b.safetensors": _checkpoint(
            "cascade-b", CASCADE_B, autoencoder=host_layouts.stage_a
        ),
    }


def wan21() -> Files:
    return {"diffusion_models/wan2.1_t2v_14B_bf16.safetensors": _diffusion_model("wan21-t2v", WAN), **_wan_others()}


def wan22() -> Files:
    return {
        f"diffusion_models/wan2.2_t2v_{noise}_noise_14B_fp16.safetensors": _diffusion_model("wan21-t2v", WAN, seed=seed)
        for seed, noise in enumerate(("high", "low"))
    } | _wan_others()


WORKFLOWS: dict[str, Callable[[], Files]] = {
    "zimage": zimage,
    "flux1": flux1,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "sd35_large": sd35_large,
    "ltx_video": ltx_video,
    "sdxl": sdxl,
    "sd15": sd15,
    "stable_cascade": stable_cascade,
    "wan21": wan21,
    "wan22": wan22,
}
"""The files of `example_workflows/layerstream_<name>.json`."""


def _wan_others() -> Files:
    return {
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": _clip_l(),
        "vae/wan_2.1_vae.safetensors": _vae("wan", host_layouts.wan_autoencoder),
    }


def _clip_l() -> Path:
    return checkpoint_cache.text_encoder("zimage")


def _diffusion_model(name: str, settings: Settings, *, seed: int = 0) -> Path:
    return _file(name, host_layouts.diffusion_model(name, settings), seed=seed)


def _unet_checkpoint(name: str, settings: Settings) -> Path:
    autoencoder = functools.partial(host_layouts.image_autoencoder, latent_channels=4)
    return _checkpoint(name, settings, has_text_encoder=True, autoencoder=autoencoder)


def _checkpoint(
    name: str,
    settings: Settings,
    *,
    has_text_encoder: bool = False,
    autoencoder: Callable[[], Any] | None = None,
    metadata: Settings | None = None,
) -> Path:
    tensors = host_layouts.checkpoint(name, settings, has_text_encoder=has_text_encoder, autoencoder=autoencoder)
    return _file(f"{name}-checkpoint", tensors, metadata=metadata)


def _vae(name: str, autoencoder: Callable[[], Any]) -> Path:
    return _file(f"{name}-vae", host_layouts.autoencoder_file(autoencoder))


def _file(name: str, tensors: list[TensorLayout], *, seed: int = 0, metadata: Settings | None = None) -> Path:
    """A file of these tensors; hosts whose classes have the same share it."""
    written = {"config": json.dumps(metadata)} if metadata else {}
    digest = hashlib.sha256(repr((tensors, seed, written)).encode()).hexdigest()[:8]
    return cached(f"{name}-{digest}", lambda path: write_random_file(path, tensors, seed=seed, metadata=written))
