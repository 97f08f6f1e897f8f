"""Turns stored blocks back into numbers on a card by Triton kernels; `dequantise` is the plain twin.

In: the bytes of a tensor on a CUDA device. Out: values in memory of their own. A kernel is bound by memory if it spends
few instructions on a value, so codes are loaded two bytes at a time, which is as far as the odd sizes of blocks are
aligned, both bytes are taken apart together, and two neighbouring values leave in one store.

Multiplications and additions are rounded apart, as the reference has it: kernels are compiled without fusing them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from .kinds import IQ4_VALUES, Kind

# Values that a program makes, and the warps that do it: 16 a thread keep enough loads on their way.
VALUES = 2048
WARPS = 4


@triton.jit
def _halves(packed, index, is_there):
    """float16 numbers at even byte `index`, as float32."""
    scales = (packed + index).to(tl.pointer_type(tl.float16))
    return tl.load(scales, mask=is_there, other=0.0).to(tl.float32)


@triton.jit
def _pairs(packed, index, is_there):
    """Two bytes at even byte `index`: the first in the low half."""
    return tl.load((packed + index).to(tl.pointer_type(tl.uint16)), mask=is_there, other=0).to(tl.int32)


@triton.jit
def _byte(packed, index, is_there):
    return tl.load(packed + index, mask=is_there, other=0).to(tl.int32)


@triton.jit
def _apart(pair):
    """The two bytes of a pair, as float32."""
    return (pair & 0xFF).to(tl.float32), (pair >> 8).to(tl.float32)


@triton.jit
def _signed(byte):
    return (byte ^ 0x80) - 0x80


@triton.jit
def _put(out, index, first, second, is_there):
    """Store `first` at `index` and `second` behind it, rounded once."""
    place = index[:, :, None] + tl.arange(0, 2)[None, None, :]
    both = tl.join(first, second).to(out.dtype.element_ty)
    tl.store(out + place, both, mask=is_there[:, :, None])


@triton.jit
def _start(packed, out, blocks, BYTES: tl.constexpr, ELEMENTS: tl.constexpr, BLOCKS: tl.constexpr):
    """Where this program's blocks and values begin, the number of each of its blocks, and which of them exist."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)[:, None]
    return packed + first * BYTES, out + first * ELEMENTS, block, first + block < blocks


@triton.jit
def q8_0_kernel(packed, out, blocks, BLOCKS: tl.constexpr):
    packed, out, block, is_there = _start(packed, out, blocks, 34, 32, BLOCKS)
    place = tl.arange(0, 16)[None, :]
    pair = _pairs(packed, block * 34 + 2 + 2 * place, is_there)
    scale = _halves(packed, block * 34, is_there)
    first, second = _signed(pair & 0xFF).to(tl.float32), _signed(pair >> 8).to(tl.float32)
    _put(out, block * 32 + 2 * place, first * scale, second * scale, is_there)


@triton.jit
def small_kernel(
    packed,
    out,
    blocks,
    values,
    BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL: 32 values, of which the low halves of 16 bytes are the first.

    `BYTES` tells them apart but for IQ4_NL, whose `OFFSET` is 0: it looks values up. Q4_1 and Q5_1 add a minimum.
    """
    packed, out, block, is_there = _start(packed, out, blocks, BYTES, 32, BLOCKS)
    place = tl.arange(0, 8)[None, :]
    at = block * BYTES
    pair = _pairs(packed, at + BYTES - 16 + 2 * place, is_there)
    low, high = pair & 0x0F0F, (pair >> 4) & 0x0F0F
    if BYTES == 22 or BYTES == 24:
        fifth = _pairs(packed, at + BYTES - 20, is_there) >> (2 * place)
        low |= ((fifth & 1) << 4) | ((fifth & 2) << 11)
        fifth = _pairs(packed, at + BYTES - 18, is_there) >> (2 * place)
        high |= ((fifth & 1) << 4) | ((fifth & 2) << 11)
    scale = _halves(packed, at, is_there)
    if OFFSET == 0 and BYTES == 18:
        a, b = tl.load(values + (low & 0xFF)), tl.load(values + (low >> 8))
        c, d = tl.load(values + (high & 0xFF)), tl.load(values + (high >> 8))
    else:
        a, b = _apart(low)
        c, d = _apart(high)
        a, b, c, d = a - OFFSET, b - OFFSET, c - OFFSET, d - OFFSET
    a, b, c, d = scale * a, scale * b, scale * c, scale * d
    if BYTES == 20 or BYTES == 24:
        least = _halves(packed, at + 2, is_there)
        a, b, c, d = a + least, b + least, c + least, d + least
    _put(out, block * 32 + 2 * place, a, b, is_there)
    _put(out, block * 32 + 16 + 2 * place, c, d, is_there)


@triton.jit
def iq4_xs_kernel(packed, out, blocks, values, BLOCKS: tl.constexpr):
    packed, out, block, is_there = _start(packed, out, blocks, 136, 256, BLOCKS)
    place = tl.arange(0, 64)[None, :]
    at, group = block * 136, place // 8
    pair = _pairs(packed, at + 8 + 2 * place, is_there)
    high = (_pairs(packed, at + 2, is_there) >> (2 * group)) & 3
    low = (_byte(packed, at + 4 + group // 2, is_there) >> (4 * (group & 1))) & 15
    scale = _halves(packed, at, is_there) * ((low | (high << 4)) - 32).to(tl.float32)
    a, b = tl.load(values + (pair & 15)), tl.load(values + ((pair >> 8) & 15))
    c, d = tl.load(values + ((pair >> 4) & 15)), tl.load(values + (pair >> 12))
    to = block * 256 + group * 32 + 2 * (place % 8)
    _put(out, to, scale * a, scale * b, is_there)
    _put(out, to + 16, scale * c, scale * d, is_there)


@triton.jit
def q2_k_kernel(packed, out, blocks, BLOCKS: tl.constexpr):
    packed, out, block, is_there = _start(packed, out, blocks, 84, 256, BLOCKS)
    place = tl.arange(0, 32)[None, :]
    at, half, half_place = block * 84, place // 16, place % 16
    pair = _pairs(packed, at + 16 + 2 * place, is_there)
    scale, least = _halves(packed, at + 80, is_there), _halves(packed, at + 82, is_there)
    for shift in tl.static_range(4):
        both = _byte(packed, at + half * 8 + shift * 2 + half_place // 8, is_there)
        by, less = scale * (both & 15).to(tl.float32), least * (both >> 4).to(tl.float32)
        a, b = _apart((pair >> (2 * shift)) & 0x0303)
        _put(out, block * 256 + half * 128 + shift * 32 + 2 * half_place, by * a - less, by * b - less, is_there)


@triton.jit
def q3_k_kernel(packed, out, blocks, BLOCKS: tl.constexpr):
    packed, out, block, is_there = _start(packed, out, blocks, 110, 256, BLOCKS)
    place = tl.arange(0, 32)[None, :]
    at, half, half_place = block * 110, place // 16, place % 16
    pair = _pairs(packed, at + 32 + 2 * place, is_there)
    third = _pairs(packed, at + 2 * half_place, is_there) >> (4 * half)
    scale = _halves(packed, at + 108, is_there)
    for shift in tl.static_range(4):
        number = shift * 2 + half_place // 8
        low = (_byte(packed, at + 96 + number, is_there) >> (4 * half)) & 15
        high = (_byte(packed, at + 104 + (number & 3), is_there) >> (4 * half + 2 * (shift // 2))) & 3
        by = scale * ((low | (high << 4)) - 32).to(tl.float32)
        # A bit that is set stands for no offset: with it, codes are 4 too large.
        a, b = _apart(((pair >> (2 * shift)) & 0x0303) | (((third >> shift) & 0x0101) << 2))
        index = block * 256 + half * 128 + shift * 32 + 2 * half_place
        _put(out, index, by * (a - 4), by * (b - 4), is_there)


@triton.jit
def _scales_and_least(packed, at, group, is_there):
    """Of sub-blocks 2 * group and the next, in the low and the high byte: the 6-bit factors of scale and minimum."""
    words = at + 4 + 2 * (group & 1)
    first = _pairs(packed, words, is_there)
    second = _pairs(packed, words + 4, is_there)
    both = _pairs(packed, words + 8, is_there)
    is_late = group >= 2
    scales = tl.where(is_late, (both & 0x0F0F) | ((first >> 2) & 0x3030), first & 0x3F3F)
    least = tl.where(is_late, ((both >> 4) & 0x0F0F) | ((second >> 2) & 0x3030), second & 0x3F3F)
    return scales, least


@triton.jit
def q4_k_kernel(packed, out, blocks, BYTES: tl.constexpr, BLOCKS: tl.constexpr):
    """Q4_K and, with 32 bytes of fifth bits before its codes, Q5_K."""
    packed, out, block, is_there = _start(packed, out, blocks, BYTES, 256, BLOCKS)
    place = tl.arange(0, 64)[None, :]
    at, group, group_place = block * BYTES, place // 16, place % 16
    pair = _pairs(packed, at + BYTES - 128 + 2 * place, is_there)
    low, high = pair & 0x0F0F, (pair >> 4) & 0x0F0F
    if BYTES == 176:
        fifth = _pairs(packed, at + 16 + 2 * group_place, is_there) >> (2 * group)
        low |= (fifth & 0x0101) << 4
        high |= (fifth & 0x0202) << 3
    scale, least = _halves(packed, at, is_there), _halves(packed, at + 2, is_there)
    scales, lesser = _scales_and_least(packed, at, group, is_there)
    low_by, high_by = _apart(scales)
    low_less, high_less = _apart(lesser)
    low_by, high_by, low_less, high_less = scale * low_by, scale * high_by, least * low_less, least * high_less
    a, b = _apart(low)
    c, d = _apart(high)
    to = block * 256 + group * 64 + 2 * group_place
    _put(out, to, low_by * a - low_less, low_by * b - low_less, is_there)
    _put(out, to + 32, high_by * c - high_less, high_by * d - high_less, is_there)


@triton.jit
def q6_k_kernel(packed, out, blocks, BLOCKS: tl.constexpr):
    packed, out, block, is_there = _start(packed, out, blocks, 210, 256, BLOCKS)
    place = tl.arange(0, 64)[None, :]
    at, half, quarter, quarter_place = block * 210, place // 32, (place // 16) % 2, place % 16
    pair = _pairs(packed, at + 2 * place, is_there)
    rest = _pairs(packed, at + 128 + half * 32 + 2 * quarter_place, is_there) >> (2 * quarter)
    number = at + 192 + half * 8 + quarter * 2 + quarter_place // 8
    scale = _halves(packed, at + 208, is_there)
    low_by = scale * _signed(_byte(packed, number, is_there)).to(tl.float32)
    high_by = scale * _signed(_byte(packed, number + 4, is_there)).to(tl.float32)
    a, b = _apart((pair & 0x0F0F) | ((rest & 0x0303) << 4))
    c, d = _apart(((pair >> 4) & 0x0F0F) | (rest & 0x3030))
    to = block * 256 + half * 128 + quarter * 32 + 2 * quarter_place
    _put(out, to, low_by * (a - 32), low_by * (b - 32), is_there)
    _put(out, to + 64, high_by * (c - 32), high_by * (d - 32), is_there)


# Name -> kernel, and what tells kinds of one kernel apart.
KERNELS: dict[str, tuple[Any, dict[str, int]]] = {
    "Q8_0": (q8_0_kernel, {}),
    "Q4_0": (small_kernel, {"BYTES": 18, "OFFSET": 8}),
    "Q4_1": (small_kernel, {"BYTES": 20, "OFFSET": 0}),
    "Q5_0": (small_kernel, {"BYTES": 22, "OFFSET": 16}),
    "Q5_1": (small_kernel, {"BYTES": 24, "OFFSET": 0}),
    "IQ4_NL": (small_kernel, {"BYTES": 18, "OFFSET": 0}),
    "IQ4_XS": (iq4_xs_kernel, {}),
    "Q2_K": (q2_k_kernel, {}),
    "Q3_K": (q3_k_kernel, {}),
    "Q4_K": (q4_k_kernel, {"BYTES": 144}),
    "Q5_K": (q4_k_kernel, {"BYTES": 176}),
    "Q6_K": (q6_k_kernel, {}),
}


def dequantise_on_card(stored: torch.Tensor, kind: Kind, dtype: torch.dtype) -> torch.Tensor:
    """Give the values of `stored` (uint8, whole blocks of `kind`), flat, in `dtype`, on the current stream.

    Raises ValueError for memory that does not begin at two bytes.
    """
    if stored.data_ptr() % 2:
        raise ValueError(f"blocks at {stored.data_ptr():#x}: they must begin at an even address")
    kernel, what = KERNELS[kind.name]
    blocks = stored.numel() // kind.size_bytes
    out = torch.empty(blocks * kind.elements, dtype=dtype, device=stored.device)
    if blocks == 0:
        return out
    arguments = [stored, out, blocks]
    if "values" in kernel.arg_names:
        arguments.append(_values(stored.device))
    at_once = VALUES // kind.elements
    kernel[(triton.cdiv(blocks, at_once),)](
        *arguments, **what, BLOCKS=at_once, num_warps=WARPS, enable_fp_fusion=False
    )
    return out


@cache
def _values(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)
