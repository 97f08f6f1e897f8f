"""Text encoders of every family and an image autoencoder, ComfyUI's own classes with few and narrow layers.

In: a name. Out: ComfyUI's CLIP or VAE object with random weights, and tokens to encode, so that no tokenizer's files
are needed. A host must be open (`hosts.open_host`) before anything here is called.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from .tiny_models import fill


class Encoder(NamedTuple):
    """Where a text encoder's class is, the narrow configurations of its models, and the names of its token lists."""

    module: str
    name: str
    configurations: dict[str, dict[str, int]]
    tokens: tuple[str, ...]
    starts_with: int = 0
    """A token that its template begins with and that its class looks for."""


# What CLIP models take, no more and no fewer.
TOKENS = 77
BATCHES = 2

CLIP = {
    "vocab_size": 20000,
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
}
T5 = {"vocab_size": 20000, "num_layers": 4, "d_model": 256, "d_ff": 512, "d_kv": 64, "num_heads": 4}
LLAMA = {
    "vocab_size": 20000,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

ENCODERS = {
    "clip_l": Encoder("comfy.sd1_clip", "SD1ClipModel", {"clip_l": CLIP}, ("l",)),
    "clip_g": Encoder("comfy.sdxl_clip", "SDXLClipModel", {"clip_l": CLIP, "clip_g": CLIP}, ("l", "g")),
    "t5xxl": Encoder("comfy.text_encoders.flux", "FluxClipModel", {"clip_l": CLIP, "t5xxl": T5}, ("l", "t5xxl")),
    "qwen3_4b": Encoder("comfy.text_encoders.z_image", "ZImageTEModel", {"qwen3_4b": LLAMA}, ("qwen3_4b",)),
    "qwen25_7b": Encoder(
        "comfy.text_encoders.qwen_image",
        "QwenImageTEModel",
        {"qwen25_7b": {**LLAMA, "vocab_size": 152064}},
        ("qwen25_7b",),
        starts_with=151644,
    ),
    # Its conditioning is made of the layers 10, 20 and 30.
    "mistral3_24b": Encoder(
        "comfy.text_encoders.flux",
        "Flux2TEModel",
        {"mistral3_24b": {**LLAMA, "num_hidden_layers": 31}},
        ("mistral3_24b",),
    ),
    "gemma2_2b": Encoder("comfy.text_encoders.lumina2", "LuminaModel", {"gemma2_2b": LLAMA}, ("gemma2_2b",)),
}

AUTOENCODER = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}


def tiny_clip(name: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """ComfyUI's CLIP object around a narrow text encoder."""
    import comfy.sd

    encoder = ENCODERS[name]
    target = SimpleNamespace(
        params={},
        clip=getattr(importlib.import_module(encoder.module), encoder.name),
        tokenizer=lambda **_: SimpleNamespace(),
    )
    options = {f"{key}_model_config": narrow for key, narrow in encoder.configurations.items()}
    clip = comfy.sd.CLIP(target, model_options={**options, "dtype": dtype})
    for module in clip.cond_stage_model.modules():
        if hasattr(module, "visual"):  # a vision model at full size, of which text needs nothing
            module.visual.blocks = module.visual.blocks[:1]
    fill(clip.cond_stage_model, seed)
    return clip


def tokens_for(name: str, seed: int = 0) -> dict[str, list[list[tuple[int, float]]]]:
    """Tokens as the encoder's tokenizer would give them."""
    generator = torch.Generator().manual_seed(seed)

    encoder = ENCODERS[name]

    def sentence() -> list[tuple[int, float]]:
        drawn = torch.randint(1000, 20000, (TOKENS,), generator=generator).tolist()
        return [(token, 1.0) for token in [encoder.starts_with or drawn[0], *drawn[1:]]]

    return {key: [sentence() for _ in range(BATCHES if key == "l" else 1)] for key in encoder.tokens}


def tiny_vae(*, seed: int = 0) -> Any:
    """ComfyUI's VAE object around a narrow autoencoder: 4 latent channels, 8 pixels to a latent one."""
    import comfy.ldm.models.autoencoder
    import comfy.sd

    model = comfy.ldm.models.autoencoder.AutoencoderKL(**AUTOENCODER)
    fill(model, seed)
    return comfy.sd.VAE(sd=model.state_dict(), config={"params": AUTOENCODER})
