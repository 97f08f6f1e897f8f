"""Which modules of which model are its blocks.

In: a diffusion model as ComfyUI built it. Out: the units that stream, by name. Families are data; a model that is not
listed is searched for its lists of modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

Unit = tuple[str, torch.nn.Module]

# Class of the diffusion model -> the module lists that hold its blocks, in the order they run.
FAMILIES: dict[str, tuple[str, ...]] = {
    "Flux": ("double_blocks", "single_blocks"),  # FLUX.1, LongCat-Image
    "NextDiT": ("context_refiner", "noise_refiner", "layers"),  # Z-Image, Lumina 2
}

# A unit smaller than this costs more in copies than it frees.
SMALLEST_UNIT_BYTES = 1024**2


class Family(NamedTuple):
    """What streams in a model, and whether the table or the search named it."""

    name: str
    units: list[Unit]
    is_listed: bool


def family_of(diffusion_model: torch.nn.Module) -> Family:
    """Find the units of a diffusion model; the list is empty when it has none."""
    name = type(diffusion_model).__name__
    paths = FAMILIES.get(name)
    if paths is None:
        return Family(name, discover(diffusion_model), is_listed=False)
    units = [
        (f"{path}.{child_name}", child)
        for path in paths
        for child_name, child in diffusion_model.get_submodule(path).named_children()
    ]
    return Family(name, units, is_listed=True)


def discover(model: torch.nn.Module) -> list[Unit]:
    """Units of a model nobody described: what is in its outermost module lists.

    Sequences inside a list are taken apart too, since some models walk over a sequence's children and never call the
    sequence itself. A unit whose forward turns out never to be called stays right: ComfyUI casts its weights when they
    are used, at the speed of its own low-memory path.
    """
    return [unit for unit in _walk(model, "") if _weight_bytes(unit[1]) >= SMALLEST_UNIT_BYTES]


def _walk(module: torch.nn.Module, prefix: str) -> Iterator[Unit]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, torch.nn.ModuleList):
            yield from _take_apart(child, path)
        else:
            yield from _walk(child, f"{path}.")


def _take_apart(container: torch.nn.Module, path: str) -> Iterator[Unit]:
    for name, child in container.named_children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)):
            yield from _take_apart(child, f"{path}.{name}")
        else:
            yield f"{path}.{name}", child


def _weight_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
