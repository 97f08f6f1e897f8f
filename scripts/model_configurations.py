"""The models of every family: as they are published, and narrow ones with the same parts.

In: a name. Out: what ComfyUI's classes are built from and what a sampler must give them. "full" is what ComfyUI detects
in the published file; "narrow" replaces widths and depths so that a pass takes milliseconds, and keeps every choice of
parts. Plain data; nothing here imports torch or ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

Settings = dict[str, Any]
Shape = tuple[int, ...]

OLDER, NEWER = "0.3.75", "0.33.0"
TEXT_TOKENS = 20


class Random(NamedTuple):
    """An input of random values, one a batch item."""

    shape: Shape


class Values(NamedTuple):
    """An input tensor of these values."""

    values: list[Any]


class Vision(NamedTuple):
    """What a vision encoder gives: its last two hidden states, random, of this shape, for an image of this size."""

    shape: Shape
    image: Shape | None = None


@dataclass(frozen=True)
class Model:
    """One model of a family.

    `supported` is its class in `comfy.supported_models`. Shapes are without the batch. `inputs` are further entries of
    its conditioning: `Random`, `Values`, `Vision`, lists of them, anything else as it is. `newer` are settings that
    only hosts from `NEWER` on know. `loads_since` is the first host that finds a narrow model's widths in its file.
    `is_listed` says whether the pack has a row for it; a slow one has parts that cannot be narrow.
    """

    supported: str
    full: Settings
    narrow: Settings
    latent: Shape
    text: Shape | None = None
    more_latents: tuple[Shape, ...] = ()
    pooled: int | None = None
    inputs: Settings = field(default_factory=dict)
    newer: Settings = field(default_factory=dict)
    since: str = OLDER
    loads_since: str | None = None
    is_listed: bool = True
    is_slow: bool = False
    family: str = ""

    def settings(self, *, narrow: bool, is_newer: bool) -> Settings:
        """What the host's class is built from."""
        return {**self.full, **(self.newer if is_newer else {}), **(self.narrow if narrow else {})}


_TEXT_MASK: Settings = {"attention_mask": Values([[1] * TEXT_TOKENS])}


def _text(width: int, tokens: int = TEXT_TOKENS) -> Shape:
    return (tokens, width)


_FLUX: Settings = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
_FLUX_NARROW: Settings = {"context_in_dim": 64, "hidden_size": 256, "num_heads": 2}
_NEWER_FLUX: Settings = {"txt_ids_dims": [], "yak_mlp": False, "txt_norm": False}
_FLUX2: Settings = {
    **_FLUX,
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "context_in_dim": 15360,
    "hidden_size": 6144,
    "mlp_ratio": 3.0,
    "num_heads": 48,
    "depth": 8,
    "depth_single_blocks": 48,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "qkv_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
_CHROMA: Settings = {
    **{name: value for name, value in _FLUX.items() if name not in ("guidance_embed", "vec_in_dim")},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
}
_NEWER_CHROMA: Settings = {"txt_ids_dims": [], "vec_in_dim": None}
_CHROMA_NARROW: Settings = {**_FLUX_NARROW, "out_dim": 256, "hidden_dim": 320, "n_layers": 2}

_LUMINA2: Settings = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 2304,
    "cap_feat_dim": 2304,
    "n_layers": 26,
    "qk_norm": True,
    "n_heads": 24,
    "n_kv_heads": 8,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
_ZIMAGE: Settings = {
    **_LUMINA2,
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}

_SD3: Settings = {
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "depth": 24,
    "input_size": None,
    "adm_in_channels": 2048,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 4096, "out_features": 24 * 64},
    },
    "num_patches": 192 * 192,
    "pos_embed_max_size": 192,
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}
# Width and heads follow from the depth, so a narrow model names its number of blocks apart.
_SD3_NARROW: Settings = {
    "depth": 4,
    "num_blocks": 4,
    "adm_in_channels": 96,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 256}},
    "num_patches": 32 * 32,
    "pos_embed_max_size": 32,
}

_UNET: Settings = {
    "use_checkpoint": False,
    "image_size": 32,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "in_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "num_heads": 8,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
_SDXL: Settings = {
    **_UNET,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}
_REFINER: Settings = {
    **_SDXL,
    "adm_in_channels": 2560,
    "model_channels": 384,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 4,
    "context_dim": 1280,
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
}

_STAGE_B: Settings = {
    "stable_cascade_stage": "b",
    "c_hidden": [320, 640, 1280, 1280],
    "nhead": [-1, -1, 20, 20],
    "blocks": [[2, 6, 28, 6], [6, 28, 6, 2]],
    "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]],
}

_LTXV: Settings = {
    "image_model": "ltxv",
    "num_layers": 28,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
}
# The number of heads is fixed at 32, so a narrow model has narrow heads.
_LTXV_NARROW: Settings = {
    "num_layers": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 256,
}

_WAN: Settings = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 5120,
    "out_dim": 16,
    "num_heads": 40,
    "ffn_dim": 13824,
    "num_layers": 40,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
}
_WAN_NARROW: Settings = {"dim": 256, "num_heads": 2, "ffn_dim": 512, "num_layers": 4}

_PREDICT2: Settings = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 16,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
_PREDICT2_NARROW: Settings = {"model_channels": 256, "num_blocks": 3, "num_heads": 4, "adaln_lora_dim": 128}
_COSMOS: Settings = {
    "image_model": "cosmos",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 4096,
    "block_config": "FA-CA-MLP",
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False,
    "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 32,
    "extra_per_block_abs_pos_emb": True,
    "rope_h_extrapolation_ratio": 1.0,
    "rope_w_extrapolation_ratio": 1.0,
    "rope_t_extrapolation_ratio": 2.0,
    "extra_per_block_abs_pos_emb_type": "learnable",
}

_HUNYUAN: Settings = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "patch_size": [1, 2, 2],
    "out_channels": 16,
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "meanflow": False,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": True,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}

_HIDREAM: Settings = {
    "image_model": "hidream",
    "attention_head_dim": 128,
    "axes_dims_rope": [64, 32, 32],
    "caption_channels": [4096, 4096],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "llama_layers": [*range(32), *[31] * 16],
    "num_attention_heads": 20,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 16,
    "num_single_layers": 32,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 2048,
}
_VISION_NARROW: Settings = {
    "hidden_size": 256,
    "num_heads": 4,
    "intermediate_size": 512,
    "depth": 2,
    "deepstack_visual_indexes": (),
}
_LANGUAGE_NARROW: Settings = {
    "vocab_size": 151936,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

_KANDINSKY5: Settings = {
    "image_model": "kandinsky5",
    "model_dim": 1792,
    "axes_dims": (16, 24, 24),
    "time_dim": 512,
    "ff_dim": 7168,
    "visual_embed_dim": 132,
    "num_text_blocks": 2,
    "num_visual_blocks": 32,
}

# Tokens that HiDream-O1's tokenizer puts around a prompt; the last one marks where the image begins.
_O1_PROMPT = [151644, 872, 198, 100, 200, 300, 151645, 198, 151644, 77091, 198, 151669, 151673]

MODELS: dict[str, Model] = {
    "flux": Model(
        "Flux",
        _FLUX,
        {**_FLUX_NARROW, "depth": 4, "depth_single_blocks": 8},
        latent=(16, 12, 12),
        text=_text(64),
        pooled=768,
        newer=_NEWER_FLUX,
        family="FLUX.1",
        loads_since=NEWER,
    ),
    "flux2": Model(
        "Flux2",
        _FLUX2,
        {**_FLUX_NARROW, "depth": 2, "depth_single_blocks": 4},
        latent=(128, 6, 6),
        text=_text(64),
        pooled=64,
        newer={"txt_ids_dims": [3], "yak_mlp": False, "txt_norm": False},
        family="FLUX.2",
        loads_since=NEWER,
    ),
    "chroma": Model(
        "Chroma",
        _CHROMA,
        {**_CHROMA_NARROW, "depth": 2, "depth_single_blocks": 4},
        latent=(16, 12, 12),
        text=_text(64),
        pooled=64,
        newer=_NEWER_CHROMA,
        family="Chroma",
    ),
    "chroma-radiance": Model(
        "ChromaRadiance",
        {
            **_CHROMA,
            "image_model": "chroma_radiance",
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": 16,
            "nerf_hidden_size": 64,
            "nerf_mlp_ratio": 4,
            "nerf_depth": 4,
            "nerf_max_freqs": 8,
            "nerf_tile_size": 512,
            "nerf_final_head_type": "conv",
            "nerf_embedder_dtype": None,
        },
        {
            **_CHROMA_NARROW,
            "depth": 2,
            "depth_single_blocks": 2,
            "nerf_hidden_size": 16,
            "nerf_depth": 2,
            "nerf_tile_size": 8,
        },
        latent=(3, 64, 64),
        text=_text(64),
        pooled=64,
        newer={**_NEWER_CHROMA, "use_x0": False, "use_sequential_txt_ids": False},
        family="Chroma Radiance",
    ),
    "longcat": Model(
        "LongCatImage",
        {
            **_FLUX,
            "vec_in_dim": None,
            "guidance_embed": False,
            "context_in_dim": 3584,
            "depth": 10,
            "depth_single_blocks": 20,
        },
        {**_FLUX_NARROW, "context_in_dim": 3584, "depth": 2, "depth_single_blocks": 3},
        latent=(16, 12, 12),
        text=_text(3584),
        newer={**_NEWER_FLUX, "txt_ids_dims": [1, 2]},
        since=NEWER,
        family="LongCat-Image",
        loads_since=NEWER,
    ),
    "qwen-image": Model(
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60},
        {"num_layers": 4, "num_attention_heads": 2, "joint_attention_dim": 64},
        latent=(16, 1, 12, 12),
        text=_text(64),
        family="Qwen-Image",
    ),
    "zimage": Model(
        "ZImage",
        _ZIMAGE,
        {"dim": 256, "cap_feat_dim": 64, "n_layers": 6, "n_heads": 2, "n_kv_heads": 2},
        latent=(16, 12, 12),
        text=_text(64),
        family="Z-Image",
    ),
    "lumina2": Model(
        "Lumina2",
        _LUMINA2,
        {"dim": 192, "cap_feat_dim": 64, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1},
        latent=(16, 12, 12),
        text=_text(64),
        family="Lumina 2",
    ),
    "zimage-omni": Model(
        "ZImage",
        {**_ZIMAGE, "siglip_feat_dim": 1152},
        {"dim": 256, "cap_feat_dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "siglip_feat_dim": 64},
        latent=(16, 12, 12),
        text=_text(64),
        inputs={
            "reference_latents": [Random((16, 8, 8))],
            "reference_latents_text_embeds": [Random(_text(64))],
            "clip_vision_outputs": [Vision((16, 64), image=(3, 64, 64))],
        },
        since=NEWER,
        family="Z-Image Omni",
    ),
    "sd3": Model(
        "SD3",
        _SD3,
        _SD3_NARROW,
        latent=(16, 12, 12),
        text=_text(64),
        pooled=96,
        family="SD3 medium",
        loads_since=OLDER,
    ),
    "sd35-medium": Model(
        "SD3",
        {
            **_SD3,
            "num_patches": 384 * 384,
            "pos_embed_max_size": 384,
            "qk_norm": "rms",
            "x_block_self_attn_layers": list(range(13)),
        },
        {**_SD3_NARROW, "x_block_self_attn_layers": [0, 1]},
        latent=(16, 12, 12),
        text=_text(64),
        pooled=96,
        family="SD3.5 medium",
        loads_since=OLDER,
    ),
    "sd35-large": Model(
        "SD3",
        {
            **_SD3,
            "depth": 38,
            "qk_norm": "rms",
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 38 * 64},
            },
        },
        _SD3_NARROW,
        latent=(16, 12, 12),
        text=_text(64),
        pooled=96,
        family="SD3.5 large",
        loads_since=OLDER,
    ),
    "sd15": Model(
        "SD15",
        _UNET,
        {"model_channels": 64, "context_dim": 64},
        latent=(4, 16, 16),
        text=_text(64),
        family="SD1.5",
    ),
    "sdxl": Model(
        "SDXL",
        _SDXL,
        {
            "model_channels": 64,
            "context_dim": 64,
            "transformer_depth": [0, 0, 1, 1, 3, 3],
            "transformer_depth_middle": 3,
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 3, 3, 3],
        },
        latent=(4, 16, 16),
        text=_text(64),
        pooled=1280,
        family="SDXL",
    ),
    "sdxl-refiner": Model(
        "SDXLRefiner",
        _REFINER,
        {"model_channels": 64, "context_dim": 64},
        latent=(4, 16, 16),
        text=_text(64),
        pooled=1280,
        family="SDXL refiner",
    ),
    "cascade-c": Model(
        "Stable_Cascade_C",
        {"stable_cascade_stage": "c", "c_cond": 2048},
        {
            "c_cond": 256,
            "c_hidden": [256, 256],
            "nhead": [4, 4],
            "blocks": [[2, 3], [3, 2]],
            "c_clip_text": 64,
            "c_clip_text_pooled": 64,
        },
        latent=(16, 12, 12),
        text=_text(64),
        pooled=64,
        family="Stable Cascade, stage C",
    ),
    "cascade-b": Model(
        "Stable_Cascade_B",
        _STAGE_B,
        {
            "c_hidden": [64, 128, 256, 256],
            "nhead": [-1, -1, 4, 4],
            "blocks": [[1, 2, 3, 2], [2, 3, 2, 1]],
            "c_cond": 256,
            "c_clip": 64,
        },
        latent=(4, 32, 32),
        pooled=64,
        inputs={"stable_cascade_prior": Random((16, 8, 8))},
        family="Stable Cascade, stage B",
    ),
    "ltxv": Model(
        "LTXV",
        _LTXV,
        _LTXV_NARROW,
        latent=(128, 3, 4, 4),
        text=_text(4096),
        inputs=_TEXT_MASK,
        family="LTX Video 2B",
        loads_since=OLDER,
    ),
    "ltxv-13b": Model(
        "LTXV",
        {**_LTXV, "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
        _LTXV_NARROW,
        latent=(128, 3, 4, 4),
        text=_text(4096),
        inputs=_TEXT_MASK,
        family="LTX Video 13B",
        loads_since=OLDER,
    ),
    "ltxav": Model(
        "LTXAV",
        {
            **_LTXV,
            "image_model": "ltxav",
            "num_layers": 48,
            "attention_head_dim": 128,
            "cross_attention_dim": 4096,
            "use_keyframes_abs_pos_embedding": False,
        },
        {
            **_LTXV_NARROW,
            "audio_cross_attention_dim": 128,
            "audio_attention_head_dim": 4,
            "caption_channels": 256,
            "connector_attention_head_dim": 64,
            "connector_num_attention_heads": 4,
        },
        latent=(128, 3, 4, 4),
        more_latents=((8, 6, 16),),
        text=_text(256),
        since=NEWER,
        family="LTX-AV",
    ),
    "wan21-t2v": Model(
        "WAN21_T2V",
        _WAN,
        _WAN_NARROW,
        latent=(16, 3, 8, 8),
        text=_text(4096),
        family="WAN 2.1 and 2.2 text to video",
        loads_since=OLDER,
    ),
    "wan21-i2v": Model(
        "WAN21_I2V",
        {**_WAN, "model_type": "i2v", "in_dim": 36},
        _WAN_NARROW,
        latent=(16, 3, 8, 8),
        text=_text(4096),
        inputs={"clip_vision_output": Vision((257, 1280)), "concat_latent_image": Random((16, 3, 8, 8))},
        family="WAN 2.1 image to video",
        loads_since=OLDER,
    ),
    "wan22-5b": Model(
        "WAN22_T2V",
        {**_WAN, "dim": 3072, "num_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_dim": 48, "out_dim": 48},
        _WAN_NARROW,
        latent=(48, 3, 8, 8),
        text=_text(4096),
        family="WAN 2.2 5B",
        loads_since=OLDER,
    ),
    "wan21-vace": Model(
        "WAN21_Vace",
        {**_WAN, "model_type": "vace", "vace_in_dim": 96, "vace_layers": 8},
        {**_WAN_NARROW, "vace_layers": 2},
        latent=(16, 3, 8, 8),
        text=_text(4096),
        inputs={
            "vace_frames": [Random((32, 3, 8, 8))] * 2,
            "vace_mask": [Random((64, 3, 8, 8))] * 2,
            "vace_strength": [1.0, 0.5],
        },
        family="WAN 2.1 VACE",
        loads_since=OLDER,
    ),
    "wan21-humo": Model(
        "WAN21_HuMo",
        {**_WAN, "model_type": "humo", "in_dim": 36},
        _WAN_NARROW,
        latent=(16, 3, 8, 8),
        text=_text(4096),
        inputs={"audio_embed": Random((3, 8, 5, 1280)), "reference_latents": [Random((16, 1, 8, 8))]},
        family="WAN 2.1 HuMo",
        is_slow=True,
        loads_since=OLDER,
    ),
    "wan22-s2v": Model(
        "WAN22_S2V",
        {**_WAN, "model_type": "s2v"},
        {**_WAN_NARROW, "audio_inject_layers": [0, 2], "audio_dim": 64},
        latent=(16, 3, 8, 8),
        text=_text(4096),
        inputs={"audio_embed": Random((25, 64, 12)), "reference_latents": [Random((16, 1, 8, 8))]},
        family="WAN 2.2 S2V",
    ),
    "wan22-animate": Model(
        "WAN22_Animate",
        {**_WAN, "model_type": "animate", "in_dim": 36},
        {**_WAN_NARROW, "num_layers": 5},
        latent=(16, 3, 8, 8),
        text=_text(4096),
        inputs={
            "clip_vision_output": Vision((257, 1280)),
            "concat_latent_image": Random((16, 3, 8, 8)),
            "pose_video_latent": Random((16, 2, 8, 8)),
            "face_video_pixels": Random((3, 1, 512, 512)),
        },
        family="WAN 2.2 Animate",
        is_slow=True,
        loads_since=OLDER,
    ),
    "cosmos-predict2": Model(
        "CosmosT2IPredict2",
        _PREDICT2,
        {**_PREDICT2_NARROW, "crossattn_emb_channels": 64},
        latent=(16, 1, 12, 12),
        text=_text(64),
        family="Cosmos Predict 2",
    ),
    "anima": Model(
        "Anima",
        {**_PREDICT2, "image_model": "anima"},
        _PREDICT2_NARROW,
        latent=(16, 1, 12, 12),
        text=_text(1024),
        inputs={"t5xxl_ids": Values(list(range(10, 25))), "t5xxl_weights": Values([1.0] * 15)},
        since=NEWER,
        family="Anima",
        is_slow=True,
    ),
    "cosmos": Model(
        "CosmosT2V",
        _COSMOS,
        {"model_channels": 256, "num_blocks": 3, "num_heads": 4, "adaln_lora_dim": 128, "crossattn_emb_channels": 64},
        latent=(16, 2, 8, 8),
        text=_text(64),
        family="Cosmos 1 7B",
    ),
    "hidream-i1": Model(
        "HiDream",
        _HIDREAM,
        {
            "attention_head_dim": 128,
            "caption_channels": [64, 64],
            "llama_layers": [0, 1, 1, 1, 1],
            "num_attention_heads": 2,
            "num_layers": 2,
            "num_single_layers": 3,
            "text_emb_dim": 64,
        },
        latent=(16, 8, 8),
        text=_text(64),
        pooled=64,
        inputs={"conditioning_llama3": Random((2, TEXT_TOKENS, 64))},
        family="HiDream-I1",
    ),
    "hidream-o1": Model(
        "HiDreamO1",
        {"image_model": "hidream_o1"},
        {"text_config_overrides": _LANGUAGE_NARROW, "vision_config_overrides": _VISION_NARROW},
        latent=(3, 64, 64),
        text=_text(64),
        inputs={"text_input_ids": Values(_O1_PROMPT), "reference_latents": [Random((64, 64, 3))]},
        since=NEWER,
        family="HiDream-O1",
    ),
    "hunyuan-video": Model(
        "HunyuanVideo",
        _HUNYUAN,
        {"context_in_dim": 64, "hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 3},
        latent=(16, 2, 8, 8),
        text=_text(64),
        pooled=768,
        newer={"meanflow_sum": False},
        family="HunyuanVideo",
        loads_since=OLDER,
    ),
    "hunyuan-video-15": Model(
        "HunyuanVideo15",
        {
            **_HUNYUAN,
            "in_channels": 65,
            "out_channels": 32,
            "patch_size": [1, 1, 1],
            "vec_in_dim": None,
            "context_in_dim": 3584,
            "hidden_size": 2048,
            "num_heads": 16,
            "depth": 54,
            "depth_single_blocks": 0,
            "byt5": True,
            "guidance_embed": False,
            "use_cond_type_embedding": True,
            "vision_in_dim": 1152,
        },
        {"context_in_dim": 64, "hidden_size": 256, "num_heads": 2, "depth": 3},
        latent=(32, 2, 6, 6),
        text=_text(64),
        pooled=64,
        inputs={"conditioning_byt5small": Random((8, 1472)), "clip_vision_output": Vision((16, 1152))},
        newer={"meanflow_sum": True},
        family="HunyuanVideo 1.5",
        loads_since=OLDER,
    ),
    "auraflow": Model(
        "AuraFlow",
        {"max_seq": 64 * 64, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36},
        {
            "max_seq": 16 * 16,
            "cond_seq_dim": 64,
            "dim": 256,
            "global_conddim": 256,
            "n_heads": 2,
            "n_double_layers": 2,
            "n_layers": 5,
        },
        latent=(4, 12, 12),
        text=_text(64),
        family="AuraFlow",
    ),
    "pixart-sigma": Model(
        "PixArtSigma",
        {
            "image_model": "pixart_sigma",
            "num_heads": 16,
            "patch_size": 2,
            "hidden_size": 1152,
            "in_channels": 4,
            "depth": 28,
            "model_max_length": 300,
            "micro_condition": False,
        },
        {"num_heads": 2, "hidden_size": 256, "depth": 3, "caption_channels": 64},
        latent=(4, 40, 40),
        text=_text(64),
        family="PixArt Sigma",
    ),
    "pixart-alpha": Model(
        "PixArtAlpha",
        {
            "image_model": "pixart_alpha",
            "num_heads": 16,
            "patch_size": 2,
            "hidden_size": 1152,
            "in_channels": 4,
            "depth": 28,
            "model_max_length": 120,
            "micro_condition": True,
        },
        {"num_heads": 2, "hidden_size": 384, "depth": 2, "caption_channels": 64},
        latent=(4, 40, 40),
        text=_text(64),
        family="PixArt Alpha",
    ),
    "kandinsky5": Model(
        "Kandinsky5",
        _KANDINSKY5,
        {
            "model_dim": 256,
            "axes_dims": (16, 24, 24),
            "time_dim": 128,
            "ff_dim": 512,
            "num_visual_blocks": 4,
        },
        latent=(16, 2, 8, 8),
        text=_text(3584),
        pooled=768,
        since=NEWER,
        family="Kandinsky 5 lite",
        loads_since=NEWER,
    ),
    "kandinsky5-pro": Model(
        "Kandinsky5",
        {
            **_KANDINSKY5,
            "model_dim": 4096,
            "axes_dims": (32, 48, 48),
            "ff_dim": 16384,
            "time_dim": 1024,
            "num_text_blocks": 4,
            "num_visual_blocks": 60,
        },
        {
            "model_dim": 256,
            "axes_dims": (32, 48, 48),
            "time_dim": 128,
            "ff_dim": 512,
            "num_text_blocks": 2,
            "num_visual_blocks": 4,
        },
        latent=(16, 2, 8, 8),
        text=_text(3584),
        pooled=768,
        since=NEWER,
        family="Kandinsky 5 pro",
    ),
    "mochi": Model(
        "GenmoMochi",
        {
            "image_model": "mochi_preview",
            "depth": 48,
            "patch_size": 2,
            "num_heads": 24,
            "hidden_size_x": 3072,
            "hidden_size_y": 1536,
            "mlp_ratio_x": 4.0,
            "mlp_ratio_y": 4.0,
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "patch_embed_bias": True,
            "posenc_preserve_area": True,
            "timestep_mlp_bias": True,
            "attend_to_padding": False,
            "timestep_scale": 1000.0,
            "use_t5": True,
            "t5_feat_dim": 4096,
            "t5_token_length": 256,
            "rope_theta": 10000.0,
        },
        {
            "depth": 3,
            "num_heads": 2,
            "hidden_size_x": 256,
            "mlp_ratio_x": 48.0,
            "hidden_size_y": 128,
            "t5_feat_dim": 64,
            "t5_token_length": TEXT_TOKENS,
        },
        latent=(12, 2, 8, 8),
        text=_text(64),
        inputs=_TEXT_MASK,
        family="Mochi",
        is_listed=False,
    ),
    "hunyuan-dit": Model(
        "HunyuanDiT",
        {"image_model": "hydit", "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637},
        {"depth": 4, "hidden_size": 256, "num_heads": 4, "mlp_ratio": 4.0},
        latent=(4, 16, 16),
        text=(77, 1024),
        inputs={
            "attention_mask": Values([[1] * 77]),
            "conditioning_mt5xl": Random((256, 2048)),
            "attention_mask_mt5xl": Values([[1] * 256]),
        },
        family="HunyuanDiT",
        is_listed=False,
    ),
    "omnigen2": Model(
        "Omnigen2",
        {
            "image_model": "omnigen2",
            "axes_dim_rope": [40, 40, 40],
            "axes_lens": [1024, 1664, 1664],
            "ffn_dim_multiplier": None,
            "hidden_size": 2520,
            "in_channels": 16,
            "multiple_of": 256,
            "norm_eps": 1e-05,
            "num_attention_heads": 21,
            "num_kv_heads": 7,
            "num_layers": 32,
            "num_refiner_layers": 2,
            "out_channels": None,
            "patch_size": 2,
            "text_feat_dim": 2048,
            "timestep_scale": 1000.0,
        },
        {"hidden_size": 240, "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 3, "text_feat_dim": 64},
        latent=(16, 12, 12),
        text=_text(64),
        inputs={**_TEXT_MASK, "reference_latents": [Random((16, 8, 8))]},
        family="OmniGen 2",
        is_listed=False,
    ),
}
