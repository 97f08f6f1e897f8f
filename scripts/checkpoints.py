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

from .layouts import components, diffusion_models
from .layouts.tensors import TensorLayout
from .random_file import write_random_file

Family = Literal["zimage", "flux"]
Size = Literal["narrow", "full"]

FAMILIES: tuple[Family, ...] = ("zimage", "flux")


class Depth(NamedTuple):
    """How many blocks of each kind a file holds; a family ignores the kinds that it lacks."""

    layers: int
    double: int
    single: int


DEPTHS: dict[Size, Depth] = {
    # Six blocks a family: Z-Image always has two pairs of refiners beside its main blocks.
    "narrow": Depth(layers=2, double=1, single=5),
    "full": Depth(layers=30, double=19, single=38),
}
ZIMAGE_TEXT_WIDTHS: dict[Size, int] = {"narrow": components.CLIP_L_WIDTH, "full": components.QWEN3_WIDTH}


def write_diffusion_model(
    family: Family,
    path: Path,
    *,
    size: Size = "narrow",
    layers: int | None = None,
    double: int | None = None,
    single: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Write a diffusion model file to `path` and return `path`.

    Narrow files: Z-Image 2.1 GB, FLUX 2.1 GB in bfloat16; full: 12.3 GB and 23.8 GB. `layers` (Z-Image) and `double`
    and `single` (FLUX) replace the size's own depth. `device` draws the values: "cuda" is much faster.

    Raises:
        ValueError: the family is unknown or a depth is below one.
    """
    standard = DEPTHS[size]
    depth = Depth(
        layers=standard.layers if layers is None else layers,
        double=standard.double if double is None else double,
        single=standard.single if single is None else single,
    )
    tensors = diffusion_model_layout(family, depth, text_width=ZIMAGE_TEXT_WIDTHS[size])
    return write_random_file(path, tensors, dtype=dtype, seed=seed, device=device)


def diffusion_model_layout(family: Family, depth: Depth, *, text_width: int) -> list[TensorLayout]:
    """The tensors of a diffusion model of `depth`; `text_width` is Z-Image's, FLUX has its own.

    Raises:
        ValueError: the family is unknown or a depth is below one.
    """
    if min(depth) < 1:
        raise ValueError(f"a {family} model needs at least one block of each kind, got {depth}")
    if family == "zimage":
        return diffusion_models.zimage(layers=depth.layers, text_width=text_width)
    if family == "flux":
        return diffusion_models.flux(double=depth.double, single=depth.single)
    raise ValueError(f"no layout for family {family!r}: choose one of {', '.join(FAMILIES)}")


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
    """
    tensors = components.qwen3_4b() if (family, size) == ("zimage", "full") else components.clip_l()
    return write_random_file(path, tensors, dtype=dtype, seed=seed, device=device)


def write_vae(
    family: Family, path: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 2, device: str = "cpu"
) -> Path:
    """Write the image autoencoder of `family` to `path` (0.17 GB in bfloat16) and return `path`.

    Raises:
        ValueError: the family is unknown; all known ones share one layout.
    """
    if family not in FAMILIES:
        raise ValueError(f"no autoencoder for family {family!r}: choose one of {', '.join(FAMILIES)}")
    return write_random_file(path, components.autoencoder(), dtype=dtype, seed=seed, device=device)


def stored_bytes(path: Path) -> int:
    """The bytes of all tensors in a safetensors file, without its header."""
    return max((end for _, end in _byte_ranges(path).values()), default=0)


def largest_block_bytes(path: Path) -> int:
    """The bytes of the largest block in a diffusion model file; a block's tensors share `name.index.`."""
    blocks: dict[tuple[str, ...], int] = {}
    for name, (start, end) in _byte_ranges(path).items():
        list_name, index, *_ = (*name.split("."), "", "")
        if index.isdecimal():
            blocks[list_name, index] = blocks.get((list_name, index), 0) + end - start
    return max(blocks.values(), default=0)


def _byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(header_bytes))
    return {name: tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__"}
