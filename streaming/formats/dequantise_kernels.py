"""The Triton kernels that turn stored blocks back into numbers; `dequantise_triton` launches them.

A program makes the values of BLOCKS blocks. Its tile has a column for each run of codes that lie together and need the
same few scales, and a place in it for each two of them: the first dimension, so that Triton gives a thread neighbouring
ones. Codes are loaded as words of two bytes, as far as the odd sizes of blocks are aligned, which Triton joins to wider
ones where they are more. Two values leave as one word, and those of four places in one store of 16 bytes (of bf16).

Multiplications and additions are rounded apart, as the reference has it: kernels are compiled without fusing them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _start(
    packed,
    out,
    blocks,
    BYTES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Of each of a block's COLUMNS columns: where the block's bytes and values begin, its number, if there is such one.

    Columns beyond the last block have that one's bytes, so that only stores need to ask.
    """
    column = tl.arange(0, BLOCKS * COLUMNS)[None, :]
    first = tl.program_id(0) * BLOCKS
    block, left = column // COLUMNS, blocks - first
    at = packed + first.to(tl.int64) * BYTES + tl.minimum(block, left - 1) * BYTES
    to = out + first.to(tl.int64) * ELEMENTS + block * ELEMENTS
    return at, to, column % COLUMNS, block < left


@triton.jit
def _words(at, index):
    """Words of two bytes, the first in the low half. What is the same for a column is to be in `at`, not `index`."""
    return tl.load(at.to(tl.pointer_type(tl.uint16)) + index).to(tl.int32)


@triton.jit
def _byte(at, index):
    return tl.load(at + index).to(tl.int32)


@triton.jit
def _half(at, index):
    """The float16 that is word `index`, as float32."""
    return tl.load(at.to(tl.pointer_type(tl.float16)) + index).to(tl.float32)


@triton.jit
def _numbers(pair, OFFSET: tl.constexpr):
    """Both bytes of a pair less OFFSET, as float32.

    Codes in the last bits of 2 ** 23 make it that much more, which takes fewer of a card's cycles than converting them.
    """
    first = ((pair & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
    second = ((pair >> 8) | 0x4B000000).to(tl.float32, bitcast=True)
    return first - (8388608.0 + OFFSET), second - (8388608.0 + OFFSET)


@triton.jit
def _put(to, place, first, second, is_there):
    """Store two values for each place, rounded once; what is the same for a column is to be in `to`, not `place`."""
    dtype: tl.constexpr = to.dtype.element_ty
    first, second = first.to(dtype), second.to(dtype)
    if dtype == tl.float32:
        low, high = first.to(tl.uint32, bitcast=True).to(tl.uint64), second.to(tl.uint32, bitcast=True).to(tl.uint64)
        tl.store(to.to(tl.pointer_type(tl.uint64)) + place, low | (high << 32), mask=is_there)
    else:
        low, high = first.to(tl.uint16, bitcast=True).to(tl.uint32), second.to(tl.uint16, bitcast=True).to(tl.uint32)
        tl.store(to.to(tl.pointer_type(tl.uint32)) + place, low | (high << 16), mask=is_there)


# -- blocks of 32 values -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["blocks"])
def q8_0_kernel(packed, out, blocks, BLOCKS: tl.constexpr):
    at, to, _, is_there = _start(packed, out, blocks, 34, 32, 1, BLOCKS)
    place = tl.arange(0, 16)[:, None]
    a, b = _numbers(_words(at + 2, place) ^ 0x8080, 128)
    scale = _half(at, 0)
    _put(to, place, a * scale, b * scale, is_there)


@triton.jit(do_not_specialize=["blocks"])
def small_kernel(packed, out, blocks, BYTES: tl.constexpr, OFFSET: tl.constexpr, BLOCKS: tl.constexpr):
    """Q4_0, Q4_1, Q5_0 and Q5_1, told apart by `BYTES`: the low halves of 16 bytes are the first 16 values.

    Q5_0 and Q5_1 have fifth bits before those bytes, Q4_1 and Q5_1 a minimum behind the scale.
    """
    at, to, _, is_there = _start(packed, out, blocks, BYTES, 32, 1, BLOCKS)
    place = tl.arange(0, 16)[:, None]
    half = place // 8
    pair = (_words(at + (BYTES - 16), place % 8) >> (4 * half)) & 0x0F0F
    if BYTES == 22 or BYTES == 24:
        fifth = _words(at + (BYTES - 20), half) >> (2 * (place % 8))
        pair |= ((fifth & 1) << 4) | ((fifth & 2) << 11)
    a, b = _numbers(pair, OFFSET)
    scale = _half(at, 0)
    a, b = scale * a, scale * b
    if BYTES == 20 or BYTES == 24:
        least = _half(at, 1)
        a, b = a + least, b + least
    _put(to, place, a, b, is_there)


@triton.jit(do_not_specialize=["blocks"])
def iq4_kernel(packed, out, blocks, values, BYTES: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    """IQ4_NL and, with 8 columns that have scales of 6 bits beside the block's, IQ4_XS: `values` has 16 float32."""
    at, to, column, is_there = _start(packed, out, blocks, BYTES, 32 * COLUMNS, COLUMNS, BLOCKS)
    place = tl.arange(0, 16)[:, None]
    pair = _words(at + (BYTES - 16 * COLUMNS) + 16 * column, place % 8) >> (4 * (place // 8))
    scale = _half(at, 0)
    if COLUMNS == 8:
        low = (_byte(at, 4 + column // 2) >> (4 * (column % 2))) & 15
        high = (_words(at, 1) >> (2 * column)) & 3
        scale *= ((low | (high << 4)) - 32).to(tl.float32)
    a, b = tl.load(values + (pair & 15)), tl.load(values + ((pair >> 8) & 15))
    _put(to + 32 * column, place, scale * a, scale * b, is_there)


# -- blocks of 256 values ----------------------------------------------------------------------------------------------
# 128 values are a `half`. Where 16 share a scale, the first and the last 16 of 32 neighbours are the `side`s.


@triton.jit(do_not_specialize=["blocks"])
def q2_k_kernel(packed, out, blocks, BLOCKS: tl.constexpr):
    at, to, column, is_there = _start(packed, out, blocks, 84, 256, 4, BLOCKS)
    half, side, place = column // 2, column % 2, tl.arange(0, 8)[:, None]
    pair = _words(at + 16 + 16 * column, place)
    scale, least = _half(at, 40), _half(at, 41)
    to += 128 * half + 16 * side
    for shift in tl.static_range(4):
        a, b = _numbers((pair >> (2 * shift)) & 0x0303, 0)
        both = _byte(at + 8 * half + side, 2 * shift)
        by, less = scale * (both & 15).to(tl.float32), least * (both >> 4).to(tl.float32)
        _put(to, place + 16 * shift, by * a - less, by * b - less, is_there)


@triton.jit(do_not_specialize=["blocks"])
def q3_k_kernel(packed, out, blocks, BLOCKS: tl.constexpr):
    at, to, column, is_there = _start(packed, out, blocks, 110, 256, 4, BLOCKS)
    half, side, place = column // 2, column % 2, tl.arange(0, 8)[:, None]
    pair = _words(at + 32 + 16 * column, place)
    third = _words(at + 16 * side, place) >> (4 * half)
    scale = _half(at, 54)
    to += 128 * half + 16 * side
    for shift in tl.static_range(4):
        # A bit that is set stands for no offset: with it, codes are 4 too large.
        a, b = _numbers(((pair >> (2 * shift)) & 0x0303) | (((third >> shift) & 0x0101) << 2), 4)
        low = (_byte(at + 96 + side, 2 * shift) >> (4 * half)) & 15
        high = (_byte(at + 104 + side, 2 * (shift % 2)) >> (4 * half + 2 * (shift // 2))) & 3
        by = scale * ((low | (high << 4)) - 32).to(tl.float32)
        _put(to, place + 16 * shift, by * a, by * b, is_there)


@triton.jit(do_not_specialize=["blocks"])
def q4_k_kernel(packed, out, blocks, BYTES: tl.constexpr, BLOCKS: tl.constexpr):
    """Q4_K and, with 32 bytes of fifth bits before its codes, Q5_K."""
    at, to, column, is_there = _start(packed, out, blocks, BYTES, 256, 4, BLOCKS)
    place = tl.arange(0, 16)[:, None]
    pair = _words(at + (BYTES - 128) + 32 * column, place)
    low, high = pair & 0x0F0F, (pair >> 4) & 0x0F0F
    if BYTES == 176:
        fifth = _words(at + 16, place) >> (2 * column)
        low |= (fifth & 0x0101) << 4
        high |= (fifth & 0x0202) << 3
    # Scales and minima are 6 bits each; those of the last columns are in the halves of bytes and in the others' ends.
    scales = at + 4 + 2 * (column % 2)
    first, second, both = _words(scales, 0), _words(scales, 2), _words(scales, 4)
    is_late = column >= 2
    by = tl.where(is_late, (both & 0x0F0F) | ((first >> 2) & 0x3030), first & 0x3F3F)
    less = tl.where(is_late, ((both >> 4) & 0x0F0F) | ((second >> 2) & 0x3030), second & 0x3F3F)
    low_by, high_by = _numbers(by, 0)
    low_less, high_less = _numbers(less, 0)
    scale, least, to = _half(at, 0), _half(at, 1), to + 64 * column
    low_by, high_by, low_less, high_less = scale * low_by, scale * high_by, least * low_less, least * high_less
    a, b = _numbers(low, 0)
    c, d = _numbers(high, 0)
    _put(to, place, low_by * a - low_less, low_by * b - low_less, is_there)
    _put(to, place + 16, high_by * c - high_less, high_by * d - high_less, is_there)


@triton.jit(do_not_specialize=["blocks"])
def q6_k_kernel(packed, out, blocks, BLOCKS: tl.constexpr):
    at, to, column, is_there = _start(packed, out, blocks, 210, 256, 8, BLOCKS)
    half, quarter, side, place = column // 4, column // 2 % 2, column % 2, tl.arange(0, 8)[:, None]
    pair = _words(at + 16 * column, place)
    rest = _words(at + 128 + 32 * half + 16 * side, place) >> (2 * quarter)
    a, b = _numbers((pair & 0x0F0F) | ((rest & 0x0303) << 4), 32)
    c, d = _numbers(((pair >> 4) & 0x0F0F) | (rest & 0x3030), 32)
    scales = at + 192 + 8 * half + 2 * quarter + side
    low, high = _byte(scales, 0) ^ 0x80, _byte(scales, 4) ^ 0x80
    scale = _half(at, 104)
    low_by, high_by = scale * (low - 0x80).to(tl.float32), scale * (high - 0x80).to(tl.float32)
    to += 128 * half + 32 * quarter + 16 * side
    _put(to, place, low_by * a, low_by * b, is_there)
    _put(to, place + 32, high_by * c, high_by * d, is_there)
