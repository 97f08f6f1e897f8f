"""Turns stored blocks back into numbers, in plain torch on any device. `dequantise_triton` does the same on a card.

In: the bytes of a tensor as its file has them. Out: values, computed in float32 by the same operations in the same
order as `gguf.quants` and rounded once to the dtype asked for, so that both give the same bits. Kinds that have no code
here go through that package on the processor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch

from .kinds import IQ4_VALUES, PLAIN, QUANTISED, SUPER_BLOCK, Kind

logger = logging.getLogger("layerstream")

# The plain way takes about 40 bytes of scratch an element; batches keep it bounded.
BATCH_ELEMENTS = 1 << 21

Blocks = torch.Tensor
"""uint8 [blocks, bytes of one]."""


def dequantise(stored: torch.Tensor, kind: Kind, dtype: torch.dtype) -> torch.Tensor:
    """Give the values of `stored` (uint8, whole blocks, any device), flat, in `dtype` on the same device.

    Raises ValueError when `stored` is not whole blocks, or nothing here can read them.
    """
    if stored.numel() % kind.size_bytes:
        raise ValueError(f"{stored.numel()} bytes are no whole blocks of {kind.name}, of {kind.size_bytes} each")
    if kind.name in PLAIN:
        return stored.view(PLAIN[kind.name]).to(dtype)
    if kind.name not in QUANTISED:
        return _through_package(stored, kind).to(dtype)
    if stored.is_cuda and dtype in WRITTEN_BY_KERNELS:
        kernels = _kernels()
        if kernels is not None:
            return kernels(stored, kind, dtype)
    return dequantise_plainly(stored, kind, dtype)


# What the kernels store; other dtypes are as rare as cards without Triton.
WRITTEN_BY_KERNELS = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _kernels() -> Callable[[torch.Tensor, Kind, torch.dtype], torch.Tensor] | None:
    try:
        from ..engine.triton_launch import can_launch
        from .dequantise_triton import dequantise_on_card
    except ImportError:
        logger.warning("LayerStream: without Triton, GGUF weights are dequantised at a fraction of the speed")
        return None
    return dequantise_on_card if can_launch() else None


def dequantise_plainly(stored: torch.Tensor, kind: Kind, dtype: torch.dtype) -> torch.Tensor:
    """What `dequantise` gives for a kind of the table, without kernels."""
    blocks = stored.view(-1, kind.size_bytes)
    out = torch.empty(len(blocks) * kind.elements, dtype=dtype, device=stored.device)
    compute = _WAYS[kind.name]
    step = BATCH_ELEMENTS // kind.elements
    for first in range(0, len(blocks), step):
        values = compute(blocks[first : first + step])
        out[first * kind.elements :][: values.numel()].copy_(values.view(-1))
    return out


def _through_package(stored: torch.Tensor, kind: Kind) -> torch.Tensor:
    import gguf

    try:
        values = gguf.quants.dequantize(stored.cpu().numpy(), gguf.GGMLQuantizationType[kind.name])
    except NotImplementedError as error:
        raise ValueError(
            f"nothing here reads {kind.name}: take a file of another quantisation, Q4_K or Q8_0 say"
        ) from error
    _warn_of_package(kind.name)
    return torch.from_numpy(values).to(stored.device)


@cache
def _warn_of_package(name: str) -> None:
    logger.warning(
        "LayerStream: %s weights are dequantised by the gguf package on the processor, which is slow; "
        "a file in Q8_0 or one of Q2_K to Q6_K runs at full speed",
        name,
    )


# -- the kinds ---------------------------------------------------------------------------------------------------------


def _half(blocks: Blocks, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _shifted(data: torch.Tensor, shifts: tuple[int, ...], mask: int, group: int) -> torch.Tensor:
    """Bits of groups of `group` bytes: [blocks, groups, shifts, group], in the order in which values lie."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    return (data.reshape(len(data), -1, 1, group) >> by) & mask


def _nibbles(data: torch.Tensor, group: int) -> torch.Tensor:
    """The low halves of `group` bytes, then their high halves, and so on: [blocks, values]."""
    return _shifted(data, (0, 4), 15, group).view(len(data), -1)


def _fifth_bits(blocks: Blocks, start: int) -> torch.Tensor:
    """A bit for each of 32 values, moved to where it belongs in them: uint8 [blocks, 32]."""
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = (blocks[:, start : start + 4, None] >> places) & 1
    return bits.view(len(blocks), 32) << 4


def _q8_0(blocks: Blocks) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).to(torch.float32) * _half(blocks, 0)


def _q4_0(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).to(torch.float32) - 8)


def _q4_1(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).to(torch.float32) + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.to(torch.float32) - 16)


def _q5_1(blocks: Blocks) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.to(torch.float32) + _half(blocks, 2)


def _iq4_values(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)[codes.to(torch.int32)]


def _iq4_nl(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _iq4_values(_nibbles(blocks[:, 2:], 16))


def _iq4_xs(blocks: Blocks) -> torch.Tensor:
    low = _nibbles(blocks[:, 4:8], 1)
    high = _shifted(blocks[:, 2:4], (0, 2, 4, 6), 3, 1).view(-1, 8)
    scales = _half(blocks, 0) * ((low | high << 4).to(torch.float32) - 32)
    return scales[..., None] * _iq4_values(_nibbles(blocks[:, 8:], 16)).view(-1, 8, 32)


def _q2_k(blocks: Blocks) -> torch.Tensor:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).to(torch.float32)
    least = _half(blocks, 82) * (blocks[:, :16] >> 4).to(torch.float32)
    codes = _shifted(blocks[:, 16:80], (0, 2, 4, 6), 3, 32).reshape(-1, 16, 16)
    return scales[..., None] * codes.to(torch.float32) - least[..., None]


def _q3_k(blocks: Blocks) -> torch.Tensor:
    low = _shifted(blocks[:, 96:104], (0, 4), 15, 8).view(-1, 16)
    high = _shifted(blocks[:, 104:108], (0, 2, 4, 6), 3, 4).view(-1, 16)
    scales = _half(blocks, 108) * ((low | high << 4).to(torch.float32) - 32)
    codes = _shifted(blocks[:, 32:96], (0, 2, 4, 6), 3, 32).view(-1, SUPER_BLOCK)
    # The offset of 4 counts where the bit is 0.
    offsets = (_shifted(blocks[:, :32], tuple(range(8)), 1, 32).view(-1, SUPER_BLOCK) ^ 1) << 2
    values = codes.to(torch.float32) - offsets.to(torch.float32)
    return scales[..., None] * values.view(-1, 16, 16)


def _scales_and_least(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K: two times eight numbers of 6 bits, [blocks, 8, 1] each, multiplied by their block's scales."""
    first, second, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (both & 15) | (first >> 2 & 48)], dim=1)
    least = torch.cat([second & 63, (both >> 4) | (second >> 2 & 48)], dim=1)
    factors = _half(blocks, 0) * scales.to(torch.float32), _half(blocks, 2) * least.to(torch.float32)
    return factors[0][..., None], factors[1][..., None]


def _q4_k(blocks: Blocks) -> torch.Tensor:
    scales, least = _scales_and_least(blocks)
    return scales * _nibbles(blocks[:, 16:], 32).view(-1, 8, 32).to(torch.float32) - least


def _q5_k(blocks: Blocks) -> torch.Tensor:
    scales, least = _scales_and_least(blocks)
    fifth = _shifted(blocks[:, 16:48], tuple(range(8)), 1, 32).view(-1, 8, 32) << 4
    codes = _nibbles(blocks[:, 48:], 32).view(-1, 8, 32) | fifth
    return scales * codes.to(torch.float32) - least


def _q6_k(blocks: Blocks) -> torch.Tensor:
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
    low = _nibbles(blocks[:, :128], 64)
    high = _shifted(blocks[:, 128:192], (0, 2, 4, 6), 3, 32).view(-1, SUPER_BLOCK)
    values = (low | high << 4).to(torch.float32) - 32
    return scales[..., None] * values.view(-1, 16, 16)


_WAYS: dict[str, Callable[[Blocks], torch.Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
assert _WAYS.keys() == QUANTISED.keys()
