"""Which modules of which model are its units.

In: a diffusion model as ComfyUI built it. Out: the units that stream, by name. Families are data; a model that is not
listed is searched for its lists of modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .dividing import (
    CONTAINERS,
    Rules,
    Unit,
    UnitLimits,
    divide,
    divide_to_leaves,
    has_forward,
    is_folded,
    weight_bytes,
    without_overlap,
)

_CASCADE = (
    "down_downscalers",
    "down_blocks",
    "down_repeat_mappers",
    "up_blocks",
    "up_repeat_mappers",
    "up_upscalers",
)

# Class of the diffusion model, by the end of its dotted name -> the modules that hold its blocks, about in the order
# they run. A subclass has its parent's row. "?" marks what only some variants have.
FAMILIES: dict[str, tuple[str, ...]] = {
    # FLUX.1, LongCat-Image; FLUX.2, whose blocks share three modulations
    "Flux": (
        "double_stream_modulation_img?",
        "double_stream_modulation_txt?",
        "single_stream_modulation?",
        "double_blocks",
        "single_blocks",
    ),
    "Chroma": ("distilled_guidance_layer", "double_blocks", "single_blocks", "nerf_blocks?"),  # with Radiance
    "QwenImageTransformer2DModel": ("transformer_blocks",),
    "NextDiT": ("context_refiner", "noise_refiner", "siglip_refiner?", "layers"),  # Z-Image, Lumina 2
    "OpenAISignatureMMDITWrapper": ("joint_blocks",),  # SD3, SD3.5
    "UNetModel": ("input_blocks", "middle_block", "output_blocks"),  # SD1.5, SD2, SDXL and its refiner
    "StageB": _CASCADE,
    "StageC": _CASCADE,
    "LTXVModel": (  # LTX Video; LTX-AV, whose connectors run before sampling, outside the model's forward
        "video_embeddings_connector?",
        "audio_embeddings_connector?",
        "transformer_blocks",
    ),
    "WanModel": (  # WAN 2.1, 2.2, VACE, Camera, S2V, Animate, ...
        "vace_blocks?",
        "blocks",
        "audio_injector?",
        "face_adapter.fuser_blocks?",
    ),
    "MiniTrainDIT": ("llm_adapter?", "blocks"),  # Cosmos Predict 2; Anima, whose adapter runs before sampling
    "GeneralDIT": ("blocks",),  # Cosmos 1
    "HiDreamImageTransformer2DModel": ("caption_projection", "double_stream_blocks", "single_stream_blocks"),
    "HiDreamO1Transformer": ("visual", "language_model.layers"),
    "HunyuanVideo": ("txt_in", "double_blocks", "single_blocks"),
    "aura.mmdit.MMDiT": ("double_layers", "single_layers"),  # AuraFlow
    "PixArtMS": ("blocks",),
    "Kandinsky5": ("text_transformer_blocks", "visual_transformer_blocks"),
}

# Classes with a forward that the model does not call: it calls their parts, or other methods of theirs.
NEVER_CALLED: frozenset[str] = frozenset(
    {
        "diffusionmodules.mmdit.DismantledBlock",
        "diffusionmodules.mmdit.SelfAttention",
        "lightricks.model.GELU_approx",
    }
)

# Parts that use an int8 layer of theirs without calling it, so that only their own forward brackets it. Those with an
# attribute `merged_mlp` do where it is true.
FOLDING: frozenset[str] = frozenset(
    {
        "lightricks.model.FeedForward",
        "wan.model.WanFeedForward",
        "minimax.model.MLP",
        "minimax_music.ar.RVQMLP",
        "text_encoders.llama.MLP",
    }
)

LIMITS = UnitLimits()


class Family(NamedTuple):
    """What streams in a model, and whether the table or the search named it."""

    name: str
    units: list[Unit]
    is_listed: bool


def family_of(diffusion_model: torch.nn.Module, limits: UnitLimits | None = None) -> Family:
    """Find the units of a diffusion model; the list is empty when it has none.

    Raises AttributeError when a listed model lacks a module of its row.
    """
    limits = limits or LIMITS
    for kind in type(diffusion_model).__mro__:
        for name, paths in FAMILIES.items():
            if _is_named(kind, name):
                return Family(name, listed_units(diffusion_model, paths, limits), is_listed=True)
    return Family(type(diffusion_model).__name__, discover(diffusion_model, limits), is_listed=False)


def listed_units(model: torch.nn.Module, paths: tuple[str, ...], limits: UnitLimits) -> list[Unit]:
    """Divide the modules at `paths`; a path that ends in "?" may be missing or None."""
    found = ((path.rstrip("?"), _submodule(model, path)) for path in paths)
    return without_overlap(
        unit for path, module in found if module is not None for unit in divide(path, module, rules_for(limits))
    )


def discover(model: torch.nn.Module, limits: UnitLimits) -> list[Unit]:
    """Units of a model nobody described: leaves within its outermost lists, or of all of it if these hold too little.

    Leaves are more and smaller units than a described model has, but they are called in any case. What is not called
    after all stays right: ComfyUI casts its weights when they are used, at the speed of its own low-memory path.
    """
    lists = without_overlap(_outermost_lists(model, ""))
    listed_bytes = sum(weight_bytes(module) for _, module in lists)
    parts = lists if 2 * listed_bytes >= weight_bytes(model) else list(model.named_children())
    return without_overlap(unit for name, part in parts for unit in divide_to_leaves(name, part, rules_for(limits)))


def text_family(model: torch.nn.Module) -> Family:
    """Find the units of a text encoder: what `discover` finds, tables of vectors left out.

    Of a table a pass reads a few rows, and streaming it would take a ring of its size.
    """
    units = [unit for unit in discover(model, LIMITS) if not isinstance(unit[1], torch.nn.Embedding)]
    return Family(type(model).__name__, units, is_listed=False)


def is_called(module: torch.nn.Module) -> bool:
    """Whether the module's forward runs where its weights are used, in the families listed here and by default."""
    return is_whole(module) or (has_forward(module) and not _is_any_of(module, NEVER_CALLED))


def is_whole(module: torch.nn.Module) -> bool:
    """Whether the module brackets weights that its parts would not."""
    return _is_any_of(module, FOLDING) and bool(getattr(module, "merged_mlp", True)) and is_folded(module)


def rules_for(limits: UnitLimits) -> Rules:
    return Rules(limits, is_called, is_whole)


def _outermost_lists(module: torch.nn.Module, prefix: str) -> Iterator[Unit]:
    for name, child in module.named_children():
        if isinstance(child, CONTAINERS):
            yield f"{prefix}{name}", child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def _submodule(model: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(path.rstrip("?"))
    except AttributeError:
        if path.endswith("?"):
            return None
        raise


def _is_any_of(module: torch.nn.Module, names: frozenset[str]) -> bool:
    return any(_is_named(type(module), name) for name in names)


def _is_named(kind: type, name: str) -> bool:
    return f".{kind.__module__}.{kind.__qualname__}".endswith(f".{name}")
