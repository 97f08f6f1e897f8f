"""Loads models from GGUF files through ComfyUI's own loaders.

In: paths. Out: a patcher or a CLIP whose weights are pages of the files until they are moved to the card or a slab.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd

from ..formats.gguf_file import GgufError, GgufFile
from .gguf_layers import GgufOperations
from .gguf_patches import GgufModelPatcher

logger = logging.getLogger("layerstream")

# What `general.architecture` says in files of text encoders, by llama.cpp's names.
TEXT_ARCHITECTURES = ("t5", "t5encoder", "llama", "mistral3", "qwen2vl", "qwen3", "qwen3vl", "gemma2", "gemma3", "clip")


def load_diffusion_model(path: Path | str, **options: Any) -> GgufModelPatcher:
    """Load a diffusion model; `options` are ComfyUI's `model_options` (`dtype`, say).

    Raises GgufError where the file is wrong or holds something else, and OSError.
    """
    file = GgufFile(path)
    architecture = file.architecture
    if architecture in TEXT_ARCHITECTURES:
        raise GgufError(
            f"{file.path.name} is a text encoder ({architecture}): load it with Load CLIP (GGUF, streamed)"
        )
    logger.info("LayerStream: %s (%s): %s", file.path.name, architecture, file.summary())
    model = comfy.sd.load_diffusion_model_state_dict(
        file.tensors(),
        model_options={"custom_operations": GgufOperations, **options},
        **_classic(comfy.sd.load_diffusion_model_state_dict),
    )
    if model is None:
        raise GgufError(
            f"{file.path.name} ({architecture or 'unnamed'}) holds no diffusion model that this ComfyUI knows: "
            "update ComfyUI, or take a file with the original names of weights"
        )
    return GgufModelPatcher.adopt(model)


def _classic(load: Callable[..., Any]) -> dict[str, bool]:
    """Ask for ComfyUI's classic patcher: the dynamic one copies plain weights only."""
    return {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(load).parameters else {}
