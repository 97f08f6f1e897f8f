"""Packs weights on a card by Triton kernels, to the bytes that `packing_format` describes; `packing` is the plain twin.

In: bit patterns on a CUDA device. Out: packed bytes in memory the caller gives. One program works on one chunk: the
first kernel chooses its base and counts what its levels take, the second writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .packing_bits import count_bits, gathered, lane_counts, lane_moves, lane_reach
from .packing_format import (
    CHUNK,
    CHUNK_ENTRY_BYTES,
    COLUMNS,
    FORMATS,
    HEADER_BYTES,
    Layout,
    header,
    layout_of,
    worst_bytes,
)

ENCODE_WARPS = 4


@triton.jit
def _exponent(pattern, LOW_BITS: tl.constexpr):
    return (pattern.to(tl.int32) >> (7 + LOW_BITS)) & (0xFF >> LOW_BITS)


@triton.jit
def measure_kernel(
    bits,  # int16 [elements]
    table,  # int32 [chunks, 3]: words of runs; second and third level's elements; escapes, base less 8
    elements,
    CHUNK: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    """Choose each chunk's base and count what its levels take."""
    chunk = tl.program_id(0)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    counts = tl.histogram(_exponent(tl.load(bits + index, mask=index < elements, other=0), LOW_BITS), 256)
    total = tl.minimum(elements - chunk * CHUNK, CHUNK)
    bin = tl.arange(0, 256)
    counts -= tl.where(bin == 0, CHUNK - total, 0)  # what pads the chunk was counted as zeros
    k = bin[None, :] - bin[:, None]
    bits_of = tl.where((k >= -8) & (k <= 5), 5, 24)
    bits_of = tl.where((k >= -2) & (k <= 3), 2, bits_of)
    bits_of = tl.where((k >= 0) & (k <= 2), 0, bits_of)
    costs = tl.sum(bits_of * counts[None, :], 1)
    base = tl.min(tl.where(costs == tl.min(costs, 0), bin, 256), 0)
    k = bin - base
    is_coded = (k >= -8) & (k <= 5)
    second = tl.sum(tl.where(is_coded & ((k < 0) | (k > 2)), counts, 0), 0)
    third = tl.sum(tl.where(is_coded & ((k < -2) | (k > 3)), counts, 0), 0)
    escapes = total - tl.sum(tl.where(is_coded, counts, 0), 0)
    words = 2 * ((second + 31) >> 5) + 3 * ((third + 31) >> 5) + ((3 * escapes + 3) >> 2)
    if words > CHUNK // 4:
        words = CHUNK // 4
        second = second * 0
        third = third * 0
        escapes = escapes * 0 + CHUNK
    tl.store(table + chunk * 3, words)
    tl.store(table + chunk * 3 + 1, second | (third << 16))
    tl.store(table + chunk * 3 + 2, escapes | ((base - 8) << 16))


@triton.jit
def _put_run(runs, word, shift, bits):
    """Put each column's bits from bit `shift` of its `word` on; neighbours may share the word."""
    both = bits.to(tl.uint64) << shift.to(tl.uint64)
    low, high = both.to(tl.uint32).to(tl.int32, bitcast=True), (both >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    tl.atomic_or(runs + word, low, mask=low != 0, sem="relaxed")
    tl.atomic_or(runs + word + 1, high, mask=high != 0, sem="relaxed")


@triton.jit
def encode_kernel(
    bits,  # int16 [elements]
    table,  # int32 [chunks, 3]: first word of runs; second and third level's elements; escapes, base less 8
    fractions,  # uint8 [quads * 4]
    planes,  # int32 [chunks, 2 + LOW_BITS, COLUMNS]
    runs,  # int32 [words], zeros
    elements,
    COLUMNS: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    chunk = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    start = tl.load(table + chunk * 3)
    counts = tl.load(table + chunk * 3 + 1)
    last = tl.load(table + chunk * 3 + 2)
    escapes, base = last & 0xFFFF, (last >> 16) + 8
    is_whole = escapes == 32 * COLUMNS
    nothing = tl.zeros([COLUMNS], tl.uint32)
    a, b, x, y, u, v, w = nothing, nothing, nothing, nothing, nothing, nothing, nothing
    low, middle, high, escape = nothing, nothing, nothing, nothing
    for place in range(32):  # unrolled, it would take seconds to compile and gain nothing
        lane, row = place >> 3, place & 7
        quad = (chunk * 8 + row) * COLUMNS + column
        index = quad * 4 + (((lane & 1) << 1) | (lane >> 1))
        is_there = index < elements
        pattern = tl.load(bits + index, mask=is_there, other=0).to(tl.int32)
        k = _exponent(pattern, LOW_BITS) - base
        is_coded = (k >= -8) & (k <= 5) & is_there & (is_whole == 0)
        third = is_coded & ((k < -2) | (k > 3))
        second = is_coded & ((k < 0) | (k > 2))
        code = tl.where(k < 0, k + 8, k + 2)
        a |= (second | (is_coded & (k == 1))).to(tl.uint32) << place
        b |= (second | (is_coded & (k == 2))).to(tl.uint32) << place
        x |= (second & (k < 0) & (k > -3)).to(tl.uint32) << place
        y |= (third | (second & (k == -2))).to(tl.uint32) << place
        u |= (third & (code > 3)).to(tl.uint32) << place
        v |= (third & ((code & 2) != 0)).to(tl.uint32) << place
        w |= (third & ((code & 1) != 0)).to(tl.uint32) << place
        escape |= (((is_coded == 0) & is_there) | is_whole).to(tl.uint32) << place
        if LOW_BITS != 0:
            low |= (pattern & 1).to(tl.uint32) << place
            middle |= ((pattern >> 1) & 1).to(tl.uint32) << place
            high |= ((pattern >> 2) & 1).to(tl.uint32) << place
        fraction = ((pattern >> 8) & 0x80) | ((pattern >> LOW_BITS) & 0x7F)
        tl.store(fractions + quad * 4 + lane, fraction.to(tl.uint8), mask=is_there)
    words = planes + chunk * (2 + LOW_BITS) * COLUMNS + column
    tl.store(words, a.to(tl.int32, bitcast=True))
    tl.store(words + COLUMNS, b.to(tl.int32, bitcast=True))
    if LOW_BITS != 0:
        tl.store(words + 2 * COLUMNS, low.to(tl.int32, bitcast=True))
        tl.store(words + 3 * COLUMNS, middle.to(tl.int32, bitcast=True))
        tl.store(words + 4 * COLUMNS, high.to(tl.int32, bitcast=True))

    mask = a & b
    in_lanes = lane_counts(mask)
    count = count_bits(in_lanes)
    bit = tl.cumsum(count, 0) - count
    word, shift, stride = start + (bit >> 5), bit & 31, ((counts & 0xFFFF) + 31) >> 5
    reach = lane_reach(in_lanes)
    one, two, four = lane_moves(mask)
    _put_run(runs, word, shift, gathered(x, mask, reach, one, two, four))
    _put_run(runs, word + stride, shift, gathered(y, mask, reach, one, two, four))
    start += 2 * stride

    mask = y & (x ^ 0xFFFFFFFF)
    in_lanes = lane_counts(mask)
    count = count_bits(in_lanes)
    bit = tl.cumsum(count, 0) - count
    word, shift, stride = start + (bit >> 5), bit & 31, (((counts >> 16) & 0xFFFF) + 31) >> 5
    reach = lane_reach(in_lanes)
    one, two, four = lane_moves(mask)
    _put_run(runs, word, shift, gathered(w, mask, reach, one, two, four))
    _put_run(runs, word + stride, shift, gathered(v, mask, reach, one, two, four))
    _put_run(runs, word + 2 * stride, shift, gathered(u, mask, reach, one, two, four))
    start += 3 * stride

    if escapes > 0:
        count = count_bits(lane_counts(escape))
        rank = tl.cumsum(count, 0) - count
        places = (runs + start).to(tl.pointer_type(tl.int16))
        exponents = (runs + start).to(tl.pointer_type(tl.uint8)) + tl.where(is_whole, 0, 2 * escapes)
        for place in range(32):
            lane, row = place >> 3, place & 7
            index = ((chunk * 8 + row) * COLUMNS + column) * 4 + (((lane & 1) << 1) | (lane >> 1))
            is_escape = ((escape >> place) & 1).to(tl.int32)
            pattern = tl.load(bits + index, mask=(is_escape != 0) & (index < elements), other=0)
            tl.store(exponents + rank, _exponent(pattern, LOW_BITS).to(tl.uint8), mask=is_escape != 0)
            number = (column * 32 + place).to(tl.int16)
            tl.store(places + rank, number, mask=(is_escape != 0) & (is_whole == 0))
            rank += is_escape


def encode(bits: torch.Tensor, room: torch.Tensor, dtype: torch.dtype) -> Layout:
    """Pack `bits` (int16 patterns of `dtype`, whole quads) into `room`; waits for the device once.

    Needs no memory besides 16 bytes a chunk. Raises ValueError when `room` is less than `worst_bytes`.
    """
    chunks, low_bits = -(-bits.numel() // CHUNK), FORMATS[dtype].low_bits
    if room.numel() < worst_bytes(bits.numel(), dtype):
        raise ValueError(f"{room.numel()} bytes of room for {bits.numel()} elements")
    table = torch.empty((chunks, CHUNK_ENTRY_BYTES // 4), dtype=torch.int32, device=bits.device)
    if chunks:
        measure_kernel[(chunks,)](bits, table, bits.numel(), CHUNK=CHUNK, LOW_BITS=low_bits, num_warps=ENCODE_WARPS)
    ends = table[:, 0].cumsum(0, dtype=torch.int32)
    layout = layout_of(bits.numel(), int(ends[-1]) if chunks else 0, dtype)
    table[:, 0] = ends - table[:, 0]
    packed = room[: layout.stored_bytes].zero_()
    packed[:HEADER_BYTES].copy_(header(layout))
    if chunks:
        packed[layout.table :][: layout.table_bytes].copy_(table.view(torch.uint8).view(-1))
        encode_kernel[(chunks,)](
            bits,
            table,
            packed[layout.fractions :],
            packed[layout.planes :][: layout.plane_bytes].view(torch.int32),
            packed[layout.runs :][: 4 * layout.words].view(torch.int32),
            bits.numel(),
            COLUMNS=COLUMNS,
            LOW_BITS=low_bits,
            num_warps=ENCODE_WARPS,
        )
    return layout
