"""Turns stored blocks back into numbers on a card by Triton kernels; `dequantise` is the plain twin.

In: the bytes of a tensor on a CUDA device. Out: values in memory of their own. The kernels are in `dequantise_kernels`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from ..engine.triton_launch import Launcher
from . import dequantise_kernels as kernels
from .kinds import IQ4_VALUES, QUANTISED, Kind


class Tile(NamedTuple):
    """What a program does: `values` of them, a power of two and whole blocks, with so many warps."""

    values: int
    warps: int


class Way(NamedTuple):
    """How a kind is dequantised: by which kernel, what tells kinds of one kernel apart, and how much at once.

    A tile is to have a thread make 16 values, or 32 of the kinds whose kernels make them in four stores: then stores
    are of 16 bytes, and neither are there more scales than threads, which Triton would pass on through shared memory.
    """

    kernel: Any
    what: dict[str, int]
    tile: Tile = Tile(2048, 4)


WAYS: dict[str, Way] = {
    "Q8_0": Way(kernels.q8_0_kernel, {}),
    "Q4_0": Way(kernels.small_kernel, {"BYTES": 18, "OFFSET": 8}),
    "Q4_1": Way(kernels.small_kernel, {"BYTES": 20, "OFFSET": 0}),
    "Q5_0": Way(kernels.small_kernel, {"BYTES": 22, "OFFSET": 16}),
    "Q5_1": Way(kernels.small_kernel, {"BYTES": 24, "OFFSET": 0}),
    "IQ4_NL": Way(kernels.iq4_kernel, {"BYTES": 18, "COLUMNS": 1}),
    "IQ4_XS": Way(kernels.iq4_kernel, {"BYTES": 136, "COLUMNS": 8}),
    "Q2_K": Way(kernels.q2_k_kernel, {}, Tile(4096, 4)),
    "Q3_K": Way(kernels.q3_k_kernel, {}, Tile(4096, 4)),
    "Q4_K": Way(kernels.q4_k_kernel, {"BYTES": 144}),
    "Q5_K": Way(kernels.q4_k_kernel, {"BYTES": 176}),
    "Q6_K": Way(kernels.q6_k_kernel, {}),
}


def dequantise_on_card(stored: torch.Tensor, kind: Kind, dtype: torch.dtype, tile: Tile | None = None) -> torch.Tensor:
    """Give the values of `stored` (uint8, whole blocks of `kind`), flat, in `dtype`, on the current stream.

    Raises ValueError for memory that does not begin at two bytes.
    """
    if stored.data_ptr() % 2:
        raise ValueError(f"blocks at {stored.data_ptr():#x}: they must begin at an even address")
    blocks = stored.numel() // kind.size_bytes
    out = torch.empty(blocks * kind.elements, dtype=dtype, device=stored.device)
    if blocks == 0:
        return out
    launcher, constants, at_once = _launcher(kind.name, tile or WAYS[kind.name].tile)
    arguments = (stored, out, blocks, *_values(kind.name, stored.device), *constants, at_once)
    key = (stored.device, dtype, stored.data_ptr() % 16 == 0, blocks >> 31)
    launcher(triton.cdiv(blocks, at_once), arguments, key)
    return out


@cache
def _launcher(name: str, tile: Tile) -> tuple[Launcher, tuple[int, ...], int]:
    """The kernel of a kind, its constants, and the blocks that a program makes."""
    way = WAYS[name]
    # Fused, a multiplication and an addition would be rounded once, where the reference rounds twice.
    launcher = Launcher(way.kernel, num_warps=tile.warps, enable_fp_fusion=False)
    return launcher, tuple(way.what.values()), tile.values // QUANTISED[name].elements


@cache
def _values(name: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What the kinds that look values up need for it."""
    if WAYS[name].kernel is not kernels.iq4_kernel:
        return ()
    with torch.inference_mode(False):
        return (torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device),)
