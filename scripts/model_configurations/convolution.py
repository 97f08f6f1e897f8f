"""Models of convolutions with skips: Stable Diffusion's UNets and Stable Cascade."""

from .model import Model, Random, Settings, text

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

MODELS: dict[str, Model] = {
    "sd15": Model(
        "SD15",
        _UNET,
        {"model_channels": 64, "context_dim": 64},
        latent=(4, 16, 16),
        text=text(64),
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
        text=text(64),
        pooled=1280,
        family="SDXL",
    ),
    "sdxl-refiner": Model(
        "SDXLRefiner",
        _REFINER,
        {
            "model_channels": 64,
            "context_dim": 64,
            "transformer_depth": [0, 0, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        },
        latent=(4, 16, 16),
        text=text(64),
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
        text=text(64),
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
}
