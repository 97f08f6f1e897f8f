"""Loads models from GGUF files through ComfyUI's own loaders.

In: paths. Out: a patcher or a CLIP whose weights are pages of the files until they are moved to the card or a slab.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths

from ..formats.gguf_file import GgufError, GgufFile
from ..formats.gguf_text import Weights, text_encoder_weights, vision_file_for
from .gguf_layers import GgufOperations, stop_casting
from .gguf_patches import GgufModelPatcher

logger = logging.getLogger("layerstream")

# What `general.architecture` says in files of text encoders, by llama.cpp's names.
TEXT_ARCHITECTURES = ("t5", "t5encoder", "llama", "mistral3", "qwen2vl", "qwen3", "qwen3vl", "gemma2", "gemma3", "clip")

# Encoders that look at images too; Qwen-Image-Edit needs it.
WITH_VISION = ("qwen2vl",)


def load_diffusion_model(path: Path | str, **options: Any) -> GgufModelPatcher:
    """Load a diffusion model; `options` are ComfyUI's `model_options` (`dtype`, say).

    Raises GgufError where the file is wrong or holds something else, and OSError.
    """
    file = GgufFile(path)
    architecture = file.architecture
    if architecture in TEXT_ARCHITECTURES:
        raise GgufError(f"{file.path.name} is a text encoder ({architecture}): load it with Load CLIP (GGUF, streamed)")
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
    if model.model.manual_cast_dtype is None:
        stop_casting(model.model.diffusion_model)
    return GgufModelPatcher.adopt(model)


def load_text_encoders(paths: Sequence[Path | str], clip_type: str, **options: Any) -> Any:
    """Load a CLIP of one to four encoders, GGUF or not, in any order. `clip_type` is as ComfyUI names it.

    Files of a vision tower (mmproj) are joined with their encoder, whether they are named or lie beside it.
    Raises GgufError, ValueError for an unknown type or more encoders than ComfyUI knows together, and OSError.
    """
    try:
        kind = comfy.sd.CLIPType[clip_type.upper()]
    except KeyError as error:
        raise ValueError(f"this ComfyUI knows no text encoders of type `{clip_type}`: choose another") from error
    towers = [path for path in map(Path, paths) if _is_tower(path)]
    encoders = [path for path in map(Path, paths) if path not in towers]
    if not encoders:
        raise GgufError(f"{towers[0].name} is a vision tower: choose the text encoder that it belongs to as well")
    states = [_text_encoder(path, towers) for path in encoders]
    return _clip(states, kind, options)


def _clip(states: list[Weights], kind: Any, options: dict[str, Any]) -> Any:
    clip = comfy.sd.load_text_encoder_state_dicts(
        states,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=kind,
        model_options={
            "custom_operations": GgufOperations,
            "initial_device": comfy.model_management.text_encoder_offload_device(),
            **options,
        },
        **_classic(comfy.sd.load_text_encoder_state_dicts),
    )
    GgufModelPatcher.adopt(clip.patcher)
    return clip


def _text_encoder(path: Path, towers: Sequence[Path]) -> Weights:
    if not _is_gguf(path):
        return _plain_text_encoder(path)
    file = GgufFile(path)
    logger.info("LayerStream: %s (%s): %s", path.name, file.architecture, file.summary())
    weights = text_encoder_weights(file)
    if comfy.sd.detect_te_model(weights) is None:
        raise GgufError(
            f"{path.name} ({file.architecture or 'unnamed'}) holds no text encoder that this ComfyUI knows: update "
            "ComfyUI, or choose another file"
        )
    if file.architecture in WITH_VISION:
        beside = [*towers, vision_file_for(path)]
        if beside[0] is None:
            logger.warning(
                "LayerStream: no vision tower (mmproj) of %s is chosen or lies beside it: it reads text only", path.name
            )
        else:
            logger.info("LayerStream: %s is the vision tower of %s", beside[0].name, path.name)
            weights |= text_encoder_weights(GgufFile(beside[0]))
    return weights


def _plain_text_encoder(path: Path) -> Weights:
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    is_quantised = any(name.endswith(("comfy_quant", "scaled_fp8", "scale_weight")) for name in weights)
    if is_quantised:
        raise GgufError(
            f"{path.name} is quantised in ComfyUI's own way, which does not go together with GGUF files: choose the "
            "fp16 file of this encoder, or a GGUF one"
        )
    return weights


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _is_tower(path: Path) -> bool:
    """By name, or by what the file says: vision towers are of llama.cpp's architecture clip."""
    if not _is_gguf(path):
        return False
    file = GgufFile(path)
    return file.architecture == "clip" and any(name.startswith("v.") for name in file.entries)


def _classic(load: Callable[..., Any]) -> dict[str, bool]:
    """Ask for ComfyUI's classic patcher: the dynamic one copies plain weights only."""
    return {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(load).parameters else {}
