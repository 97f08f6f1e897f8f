"""Writes the model files of a family with random weights: diffusion model, text encoder, image autoencoder.

The files have the names, shapes and types of published ones, so ComfyUI detects and loads them like real models; only
the values are random. "full" is the real size; "narrow" is the cheapest that both supported ComfyUI versions accept:
they derive all widths from the family, so only depth is free. Nothing here imports ComfyUI.
"""

import json
import struct
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from .layouts import components, diffusion_models, unet
from .layouts.tensors import TensorLayout
from .layouts.unet import UNetDepth
from .random_file import write_random_file

Family = Literal["zimage", "flux", "qwen-image", "sdxl"]
Size = Literal["narrow", "full"]

FAMILIES: tuple[Family, ...] = ("zimage", "flux", "qwen-image", "sdxl")


class Depth(NamedTuple):
    """How many blocks of each kind a transformer's file holds; a family ignores the kinds that it lacks."""

    layers: int = 1
    double: int = 1
    single: int = 1


DEPTHS: dict[Size, dict[Family, Depth]] = {
    # Z-Image has two pairs of refiners beside its main blocks, so that it comes to six blocks as FLUX does.
    "narrow": {"zimage": Depth(layers=2), "flux": Depth(double=1, single=5), "qwen-image": Depth(layers=3)},
    "full": {"zimage": Depth(layers=30), "flux": Depth(double=19, single=38), "qwen-image": Depth(layers=60)},
}
UNET_DEPTHS: dict[Size, UNetDepth] = {
    # Segmind-Vega's way down, the shallowest that ComfyUI takes for an SDXL.
    "narrow": UNetDepth((0, 1, 2), 1, (0, 1, 1)),
    "full": UNetDepth((0, 2, 10), 10, (0, 2, 10)),
}
ZIMAGE_TEXT_WIDTHS: dict[Size, int] = {"narrow": components.CLIP_L_WIDTH, "full": components.QWEN3_WIDTH}
DTYPES: dict[Family, torch.dtype] = {
    "zimage": torch.bfloat16,
    "flux": torch.bfloat16,
    "qwen-image": torch.bfloat16,
    "sdxl": torch.float16,
}
"""The type of the published files' weights."""
CHECKPOINT_PREFIX = "model.diffusion_model."
"""What the names of a diffusion model begin with in a file that holds other parts too."""
COMPONENT_FAMILIES: tuple[Family, ...] = ("zimage", "flux")
"""The families whose text encoder and autoencoder can be written too; both take images of 16 latent channels."""


def write_diffusion_model(
    family: Family,
    path: Path,
    *,
    size: Size = "narrow",
    layers: int | None = None,
    double: int | None = None,
    single: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Write a diffusion model file to `path` and return `path`.

    Full files, in the published type that `dtype=None` stands for: Z-Image 12.3 GB, FLUX 23.8 GB, Qwen-Image 40.9 GB,
    SDXL 5.1 GB; narrow: 2.2, 2.2, 2.1 and 1.4 GB. `layers` (Z-Image, Qwen-Image) and `double` and `single` (FLUX)
    replace the size's own depth. `device` draws the values: "cuda" is much faster.

    Raises:
        ValueError: the family is unknown, a depth is below one, or SDXL is given one.
    """
    depth = {"layers": layers, "double": double, "single": single}
    given = {kind: count for kind, count in depth.items() if count is not None}
    tensors = diffusion_model_layout(family, size, **given)
    return write_random_file(path, tensors, dtype=dtype or DTYPES[family], seed=seed, device=device)


def diffusion_model_layout(family: Family, size: Size, **depth: int) -> list[TensorLayout]:
    """The tensors of a diffusion model file; `depth` replaces fields of the size's own `Depth`.

    Raises:
        ValueError: the family is unknown, a depth is below one, or SDXL is given one.
    """
    if family not in FAMILIES:
        raise ValueError(f"no layout for family {family!r}: choose one of {', '.join(FAMILIES)}")
    if family == "sdxl":
        if depth:
            raise ValueError(f"SDXL's depth is its size's own: {', '.join(depth)} cannot be set")
        return unet.sdxl(UNET_DEPTHS[size])
    chosen = DEPTHS[size][family]._replace(**depth)
    if min(chosen) < 1:
        raise ValueError(f"a {family} model needs at least one block of each kind, got {chosen}")
    if family == "zimage":
        return diffusion_models.zimage(layers=chosen.layers, text_width=ZIMAGE_TEXT_WIDTHS[size])
    if family == "flux":
        return diffusion_models.flux(double=chosen.double, single=chosen.single)
    return diffusion_models.qwen_image(layers=chosen.layers)


def write_text_encoder(
    family: Family,
    path: Path,
    *,
    size: Size = "narrow",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
    device: str = "cpu",
) -> Path:
    """Write the text encoder that drives `family` to `path` and return `path`.

    Z-Image full: Qwen3-4B, 8.0 GB. Z-Image narrow: CLIP-L, 0.25 GB, because ComfyUI always builds Qwen3's 36 layers;
    the narrow diffusion model takes text vectors of its width. FLUX: CLIP-L, the smaller of its two encoders.

    Raises:
        ValueError: the family has no text encoder here.
    """
    _check_components(family)
    tensors = components.qwen3_4b() if (family, size) == ("zimage", "full") else components.clip_l()
    return write_random_file(path, tensors, dtype=dtype, seed=seed, device=device)


def write_vae(
    family: Family, path: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 2, device: str = "cpu"
) -> Path:
    """Write the image autoencoder of `family` to `path` (0.17 GB in bfloat16) and return `path`.

    Raises:
        ValueError: the family has no autoencoder here; those that have one share its layout.
    """
    _check_components(family)
    return write_random_file(path, components.autoencoder(), dtype=dtype, seed=seed, device=device)


def _check_components(family: Family) -> None:
    """Raise ValueError unless `family`'s text encoder and autoencoder can be written."""
    if family not in COMPONENT_FAMILIES:
        raise ValueError(
            f"only a diffusion model of {family!r} can be written: choose {' or '.join(COMPONENT_FAMILIES)}"
        )


def stored_bytes(path: Path) -> int:
    """The bytes of the diffusion model in a safetensors file, alone there or in a checkpoint."""
    return sum(end - start for start, end in _byte_ranges(path).values())


def largest_block_bytes(path: Path) -> int:
    """The bytes of the largest block of the diffusion model in a file; a block's tensors share `name.index.`."""
    blocks: dict[tuple[str, ...], int] = {}
    for name, (start, end) in _byte_ranges(path).items():
        list_name, index, *_ = (*name.split("."), "", "")
        if index.isdecimal():
            blocks[list_name, index] = blocks.get((list_name, index), 0) + end - start
    return max(blocks.values(), default=0)


def _byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Where a file has the tensors of its diffusion model, by their names in that model."""
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(header_bytes))
    ranges = {name: tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__"}
    in_checkpoint = {name for name in ranges if name.startswith(CHECKPOINT_PREFIX)}
    return {name.removeprefix(CHECKPOINT_PREFIX): ranges[name] for name in in_checkpoint or ranges}
