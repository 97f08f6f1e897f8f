"""How the pack divides a model into units, and what would be wrong with that.

In: a model of ComfyUI's. Out: figures of its units and complaints in words. A host must be open (`hosts.open_host`)
before anything here is called.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .pack import load_pack
from .tiny_models import build_model

# What a narrow model is divided by: about in the proportion of its widths to the real ones.
NARROW_UNITS = {"largest_bytes": 768 * 1024, "smallest_bytes": 64 * 1024}

# Large weights that no forward but the whole model's reads, or of which a pass reads a few rows.
BARE_WEIGHTS = ("pos_embed", "positional_encoding", "language_model.embed_tokens.weight")

# What a model may have in no unit beside those, as a share of the published model.
MOST_LEFT_OUT = 0.03


@dataclass(frozen=True)
class Division:
    """The units of one model, in bytes of weights."""

    family: str
    is_listed: bool
    units: int
    total_bytes: int
    outside_bytes: int
    bare_bytes: int
    largest_bytes: int
    median_bytes: int

    @property
    def left_out_share(self) -> float:
        """How much of the model is in no unit though it could be."""
        return (self.outside_bytes - self.bare_bytes) / self.total_bytes


def divide(diffusion_model: torch.nn.Module) -> Division:
    """How the pack divides a model. Raises AttributeError where its row names a module that is not there."""
    weight_bytes = pack_module("host.dividing").weight_bytes
    family = pack_module("host.families").family_of(diffusion_model)
    sizes = sorted(weight_bytes(unit) for _, unit in family.units)
    total = weight_bytes(diffusion_model)
    return Division(
        family.name,
        family.is_listed,
        units=len(sizes),
        total_bytes=total,
        outside_bytes=total - sum(sizes),
        bare_bytes=sum(weight.nbytes for path, weight in diffusion_model.state_dict().items() if path in BARE_WEIGHTS),
        largest_bytes=sizes[-1] if sizes else 0,
        median_bytes=sizes[len(sizes) // 2] if sizes else 0,
    )


def full_size_model(name: str) -> torch.nn.Module:
    """The published diffusion model of `name` in bf16, without values."""
    model: torch.nn.Module = build_model(name, dtype=torch.bfloat16, device="meta", narrow=False).diffusion_model
    return model


def complaints_of_full_size(division: Division) -> list[str]:
    """What is wrong with how a published model is divided."""
    if division.left_out_share < MOST_LEFT_OUT:
        return []
    return [f"full size: {division.left_out_share:.0%} of the weights are in no unit, {MOST_LEFT_OUT:.0%} may be"]


def uncalled_units(diffusion_model: torch.nn.Module, called: set[str]) -> list[str]:
    """The units of a model that are not among the modules that were called, with their class."""
    units = pack_module("host.families").family_of(diffusion_model).units
    return [f"{path} ({type(unit).__name__}) was never called" for path, unit in units if path not in called]


@contextlib.contextmanager
def trace_calls(model: torch.nn.Module) -> Iterator[set[str]]:
    """Collect the names of the modules that are called meanwhile."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, path=path: called.add(path))
        for path, module in model.named_modules()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def narrow_units() -> Iterator[None]:
    """Divide narrow models as the real ones are, by limits of their own."""
    families = pack_module("host.families")
    kept = families.LIMITS
    families.LIMITS = type(kept)(**NARROW_UNITS)
    try:
        yield
    finally:
        families.LIMITS = kept


def pack_module(name: str) -> Any:
    """A module of the pack's `streaming`."""
    load_pack()
    return importlib.import_module(f"layerstream.streaming.{name}")
