"""Diffusion model files as they are published, for benchmarks: size, type, and every tensor's name and shape.

In: a family's name. Out: a layout for `random_file`, at full size or narrow, the least that ComfyUI still takes for the
family. Four families' layouts are written down (`checkpoints`); the others come from the open ComfyUI's own classes
(`host_layouts`). Sizes are those of the published weights; a checkpoint's other parts are left out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import checkpoints, host_layouts, workflow_models
from .checkpoints import DTYPES, Size
from .hosts import Host
from .layouts.tensors import TensorLayout
from .model_configurations import NEWER, OLDER
from .model_configurations.model import Settings
from .random_file import write_random_file
from .random_fp8 import write_random_fp8
from .tiny_models import is_newer_host


class Published(NamedTuple):
    """One published file. `model` is its name in `model_configurations`, None where the layout is written down, under
    the name `like` if not its own; `narrow` replaces settings, `narrow_older` in hosts before `NEWER`. Names in the
    file end otherwise than the class's own where `renamed` says so. Hosts before `since` do not know the model."""

    bytes: int
    dtype: torch.dtype
    model: str | None = None
    narrow: Settings = {}
    narrow_older: Settings | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    since: str = OLDER
    like: checkpoints.Family | None = None


# The newer host's class has its own norms; files and the older one have FLUX.1's.
_FLUX_NORMS = ((".query_norm.weight", ".query_norm.scale"), (".key_norm.weight", ".key_norm.scale"))
_LEVELS_OF_ONE_WIDTH: Settings = {"channel_mult": [1, 1, 1, 1]}

PUBLISHED: dict[str, Published] = {
    "zimage": Published(12_309_817_472, DTYPES["zimage"]),
    "flux": Published(23_802_816_640, DTYPES["flux"]),
    "flux-fp8": Published(11_901_408_320, torch.float8_e4m3fn, like="flux"),
    "flux2": Published(
        7_751_089_152,
        torch.bfloat16,
        model="flux2-klein",
        narrow=workflow_models.FLUX2,
        renamed=_FLUX_NORMS,
        since=NEWER,
    ),
    "flux2-dev": Published(
        64_446_562_304,
        torch.bfloat16,
        model="flux2",
        narrow=workflow_models.FLUX2,
        narrow_older=workflow_models.FLUX2_WIDE,
        renamed=_FLUX_NORMS,
    ),
    "qwen-image": Published(40_860_802_176, DTYPES["qwen-image"]),
    "sd35-large": Published(16_292_561_536, torch.float16, model="sd35-large", narrow=workflow_models.SD35),
    "ltx": Published(3_846_770_944, torch.bfloat16, model="ltxv", narrow=workflow_models.LTX),
    "sdxl": Published(5_134_927_368, DTYPES["sdxl"]),
    "sd15": Published(1_719_041_928, torch.float16, model="sd15", narrow=_LEVELS_OF_ONE_WIDTH),
    "cascade-b": Published(3_125_882_272, torch.bfloat16, model="cascade-b", narrow=workflow_models.CASCADE_B),
    "cascade-c": Published(7_178_207_264, torch.bfloat16, model="cascade-c", narrow=workflow_models.CASCADE_C),
    "wan21-14b": Published(28_576_983_168, torch.bfloat16, model="wan21-t2v", narrow=workflow_models.WAN),
}
"""FLUX.2 is Klein 4B, FLUX.2 dev has a row of its own; LTX Video is the 2B model; WAN 2.1 makes video from text.
Bytes of fp8 are one a weight, without scales and what is not in fp8."""


def layout(family: str, size: Size) -> list[TensorLayout]:
    """The tensors of a family's file. A host must be open where the layout is a host's (`needs_host`).

    Raises:
        ValueError: the open host does not know the model.
    """
    row = PUBLISHED[family]
    if row.model is None:
        # Rows without a model are its.
        return checkpoints.diffusion_model_layout(row.like or family, size)  # type: ignore[arg-type]
    if row.since == NEWER and not is_newer_host():
        raise ValueError(f"{family} is not in this ComfyUI: use {NEWER} or later")
    settings: dict[str, Any] = {}
    if size == "narrow":
        settings = row.narrow if row.narrow_older is None or is_newer_host() else row.narrow_older
    tensors = host_layouts.diffusion_model(row.model, settings)
    return [tensor._replace(name=_file_name(tensor.name, row)) for tensor in tensors]


def needs_host(family: str) -> bool:
    """Whether a host must be open to know the family's tensors."""
    return PUBLISHED[family].model is not None


def is_known_to(host: Host, family: str) -> bool:
    """Whether a host has the family's model."""
    return PUBLISHED[family].since == OLDER or _numbers(host.version) >= _numbers(NEWER)


def ensure_file(family: str, size: Size, folder: Path, *, seed: int, device: str) -> Path:
    """The family's file in `folder`, written first when it is missing."""
    path = folder / f"{file_stem(family, size)}-seed{seed}.safetensors"
    if not path.exists():
        write_file(family, size, path, seed=seed, device=device)
    return path


def write_file(family: str, size: Size, path: Path, *, seed: int = 0, device: str = "cpu") -> Path:
    """Write the family's file to `path` and return it."""
    dtype = PUBLISHED[family].dtype
    if dtype == torch.float8_e4m3fn:
        return write_random_fp8(path, layout(family, size), seed=seed, device=device)
    return write_random_file(path, layout(family, size), dtype=dtype, seed=seed, device=device)


def file_stem(family: str, size: Size) -> str:
    """A name for a family's file, another one for another layout."""
    digest = hashlib.sha256(repr(layout(family, size)).encode()).hexdigest()[:8]
    return f"{file_prefix(family, size)}{digest}"


def file_prefix(family: str, size: Size) -> str:
    """What the names of a family's files of this size begin with."""
    return f"{family}-{size}-{str(PUBLISHED[family].dtype).removeprefix('torch.')}-"


def _file_name(name: str, row: Published) -> str:
    for own, published in row.renamed:
        if name.endswith(own):
            return name.removesuffix(own) + published
    return name


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]
