"""The fast coder of packed weights, as Triton kernels. The format and its plain twin are in `packing`.

In: bit patterns or packed bytes on a CUDA device. Out: packed bytes, or bit patterns in memory the caller gives. One
program works on one chunk. LOW_BITS, a format's mantissa bits outside the fraction byte, is 0 for bf16, which has no
instruction for them then, and 3 for fp16.

Decoding is bound by integer arithmetic, not by memory, so it works on the four elements of a quad at once, a byte each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .packing import (
    CHUNK,
    CHUNK_ENTRY_BYTES,
    COLUMNS,
    ESCAPE,
    FORMATS,
    HEADER_BYTES,
    QUAD,
    ROWS,
    WINDOW,
    Layout,
    header,
    layout_of,
    worst_bytes,
)

DECODE_WARPS = 2
ENCODE_WARPS = 4


@triton.jit
def _count_bits(word):
    """Set bits of each uint32, by the usual sums of neighbours; Triton has no portable instruction for it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _next_escapes(escape_list, rank, count, escapes, HELD: tl.constexpr):
    """The next HELD escapes of each column as bytes of a uint64, zero where there are fewer than that."""
    held = tl.zeros_like(rank).to(tl.uint64)
    for k in tl.static_range(HELD):
        # Ranks come from the bytes; the bound holds whatever they are.
        inside = (k < count) & (rank + k >= 0) & (rank + k < escapes)
        held |= tl.load(escape_list + rank + k, mask=inside, other=0).to(tl.uint64) << (8 * k)
    return held


@triton.jit
def _two(word, LOW: tl.constexpr):
    """Two neighbouring bytes of `word`, the lower pair or the upper, each in the low half of 16 bits."""
    if LOW:
        return (word & 0xFF) | ((word & 0xFF00) << 8)
    else:
        return ((word >> 16) & 0xFF) | ((word >> 8) & 0xFF0000)


@triton.jit
def _join(fraction, rest, LOW_BITS: tl.constexpr):
    """Two patterns in a uint32, each from a fraction and a `rest` (exponent, low bits) in the low byte of its half."""
    if LOW_BITS == 0:
        return ((fraction & 0x00800080) << 8) | (rest << 7) | (fraction & 0x007F007F)
    else:
        return (
            ((fraction & 0x00800080) << 8)
            | ((rest & 0x00F800F8) << 7)
            | ((fraction & 0x007F007F) << 3)
            | (rest & 0x00070007)
        )


@triton.jit
def _plane(planes, number: tl.constexpr, column):
    """The words of one plane: uint32 [COLUMNS]."""
    return tl.load(planes + number * column.shape[0] + column).to(tl.uint32, bitcast=True)


@triton.jit
def _values(low, middle, high, row: tl.constexpr):
    """The 3-bit values of a row's quads, a byte each."""
    value = (low >> row) & 0x01010101
    value |= ((middle >> row) & 0x01010101) << 1
    value |= ((high >> row) & 0x01010101) << 2
    return value


@triton.jit
def decode_kernel(
    table,  # int32 [chunks, 2]: first escape; lowest exponent in the low byte
    fractions,  # uint32 [quads]
    planes,  # uint32 [chunks, 3 + LOW_BITS, COLUMNS]
    escape_list,  # uint8 [escapes]
    out,  # int64 [quads]
    quads,
    escapes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    chunk = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    escape = tl.load(table + chunk * 2)
    lowest = (tl.load(table + chunk * 2 + 1) & 0xFF).to(tl.uint32) * 0x01010101
    planes += chunk * (3 + LOW_BITS) * COLUMNS
    low, middle, high = _plane(planes, 0, column), _plane(planes, 1, column), _plane(planes, 2, column)
    if LOW_BITS != 0:
        low_rest, middle_rest = _plane(planes, 3, column), _plane(planes, 4, column)
        high_rest = _plane(planes, 5, column)
    is_escape = low & middle & high
    count = _count_bits(is_escape)
    rank = tl.cumsum(count, 0) - count + escape
    held = _next_escapes(escape_list, rank, count, escapes, 8)
    # A column rarely has more escapes than are held; where one has, each row fetches its own.
    overflows = tl.max(count, 0) > 8
    base = chunk * ROWS * COLUMNS
    for row in tl.static_range(ROWS):
        index = base + row * COLUMNS + column
        inside = index < quads
        fraction = tl.load(fractions + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
        flags = (is_escape >> row) & 0x01010101
        mask = (flags << 8) - flags
        code = _values(low, middle, high, row)
        here = (flags * 0x01010101) >> 24
        if overflows:
            held = _next_escapes(escape_list, rank, here.to(tl.int32), escapes, 4)
            rank += here.to(tl.int32)
        # Deal the held bytes to the elements that are escapes, in order.
        left = held.to(tl.uint32)
        dealt = left & 0xFF
        left = left >> ((flags & 0x1) << 3)
        dealt |= (left & 0xFF) << 8
        left = left >> ((flags >> 5) & 0x8)
        dealt |= (left & 0xFF) << 16
        left = left >> ((flags >> 13) & 0x8)
        dealt |= left << 24
        held = held >> (here << 3).to(tl.uint64)
        keep = mask ^ 0xFFFFFFFF
        rest = (((code & keep) + lowest) & keep) | (dealt & mask)
        if LOW_BITS != 0:
            # Corrupt exponents must not reach the neighbours.
            rest = ((rest & 0x1F1F1F1F) << LOW_BITS) | _values(low_rest, middle_rest, high_rest, row)
        first = _join(_two(fraction, True), _two(rest, True), LOW_BITS)
        second = _join(_two(fraction, False), _two(rest, False), LOW_BITS)
        both = first.to(tl.uint64) | (second.to(tl.uint64) << 32)
        tl.store(out + index, both.to(tl.int64, bitcast=True), mask=inside)


@triton.jit
def _exponent(pattern, LOW_BITS: tl.constexpr):
    return (pattern.to(tl.int32) >> (7 + LOW_BITS)) & (0xFF >> LOW_BITS)


@triton.jit
def measure_kernel(
    bits,  # int16 [elements]
    table,  # int32 [chunks, 2]: escapes of the chunk, lowest exponent
    elements,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    """Choose each chunk's window and count what falls outside it."""
    chunk = tl.program_id(0)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = index < elements
    exponent = _exponent(tl.load(bits + index, mask=inside, other=0), LOW_BITS)
    counts = tl.histogram(exponent, 256)
    total = tl.minimum(elements - chunk * CHUNK, CHUNK)
    counts -= tl.where(tl.arange(0, 256) == 0, CHUNK - total, 0)  # what pads the chunk was counted as zeros
    start = tl.arange(0, 256)[:, None]
    bin = tl.arange(0, 256)[None, :]
    held = tl.sum(tl.where((bin >= start) & (bin < start + WINDOW), counts[None, :], 0), 1)
    held = tl.where(tl.arange(0, 256) <= 256 - WINDOW, held, -1)
    most = tl.max(held, 0)
    lowest = tl.min(tl.where(held == most, tl.arange(0, 256), 256), 0)
    tl.store(table + chunk * 2, total - most)
    tl.store(table + chunk * 2 + 1, lowest)


@triton.jit
def encode_kernel(
    bits,  # int16 [elements]
    table,  # int32 [chunks, 2]: first escape, lowest exponent
    fractions,  # uint8 [elements]
    planes,  # int32 [chunks, 3 + LOW_BITS, COLUMNS]
    escape_list,  # uint8 [escapes]
    elements,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUAD: tl.constexpr,
    WINDOW: tl.constexpr,
    ESCAPE: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    chunk = tl.program_id(0)
    escape = tl.load(table + chunk * 2)
    lowest = tl.load(table + chunk * 2 + 1)
    column = tl.arange(0, COLUMNS)
    low = tl.zeros([COLUMNS], tl.int32)
    middle = tl.zeros([COLUMNS], tl.int32)
    high = tl.zeros([COLUMNS], tl.int32)
    low_rest = tl.zeros([COLUMNS], tl.int32)
    middle_rest = tl.zeros([COLUMNS], tl.int32)
    high_rest = tl.zeros([COLUMNS], tl.int32)
    count = tl.zeros([COLUMNS], tl.int32)
    for place in range(ROWS * QUAD):  # unrolled, it would take seconds to compile and gain nothing
        index = ((chunk * ROWS + place // QUAD) * COLUMNS + column) * QUAD + place % QUAD
        inside = index < elements
        pattern = tl.load(bits + index, mask=inside, other=0).to(tl.int32)
        code = _exponent(pattern, LOW_BITS) - lowest
        code = tl.where((code >= 0) & (code < WINDOW), code, ESCAPE)
        code = tl.where(inside, code, 0)
        bit = 8 * (place % QUAD) + place // QUAD
        low |= (code & 1) << bit
        middle |= ((code >> 1) & 1) << bit
        high |= ((code >> 2) & 1) << bit
        if LOW_BITS != 0:
            low_rest |= (pattern & 1) << bit
            middle_rest |= ((pattern >> 1) & 1) << bit
            high_rest |= ((pattern >> 2) & 1) << bit
        count += (code == ESCAPE).to(tl.int32)
        fraction = ((pattern >> 8) & 0x80) | ((pattern >> LOW_BITS) & 0x7F)
        tl.store(fractions + index, fraction.to(tl.uint8), mask=inside)
    words = planes + chunk * (3 + LOW_BITS) * COLUMNS + column
    tl.store(words, low)
    tl.store(words + COLUMNS, middle)
    tl.store(words + 2 * COLUMNS, high)
    if LOW_BITS != 0:
        tl.store(words + 3 * COLUMNS, low_rest)
        tl.store(words + 4 * COLUMNS, middle_rest)
        tl.store(words + 5 * COLUMNS, high_rest)
    rank = tl.cumsum(count, 0) - count + escape
    for place in range(ROWS * QUAD):
        index = ((chunk * ROWS + place // QUAD) * COLUMNS + column) * QUAD + place % QUAD
        is_escape = ((low & middle & high) >> (8 * (place % QUAD) + place // QUAD)) & 1
        exponent = _exponent(tl.load(bits + index, mask=is_escape != 0, other=0), LOW_BITS)
        tl.store(escape_list + rank, exponent.to(tl.uint8), mask=is_escape != 0)
        rank += is_escape


class TritonPacker:
    """The packer of CUDA devices."""

    def encode(self, raw: torch.Tensor, room: torch.Tensor, dtype: torch.dtype) -> Layout:
        """Pack `raw` (uint8 over patterns of `dtype`, whole quads) into `room`; waits for the device once.

        Needs no memory besides 8 bytes a chunk. Raises ValueError when `room` is less than `worst_bytes`.
        """
        bits = raw.view(torch.int16)
        chunks = -(-bits.numel() // CHUNK)
        low_bits = FORMATS[dtype].low_bits
        if room.numel() < worst_bytes(bits.numel(), dtype):
            raise ValueError(f"{room.numel()} bytes of room for {bits.numel()} elements")
        table = torch.empty((chunks, 2), dtype=torch.int32, device=bits.device)
        if chunks:
            measure_kernel[(chunks,)](
                bits, table, bits.numel(), CHUNK=CHUNK, WINDOW=WINDOW, LOW_BITS=low_bits, num_warps=ENCODE_WARPS
            )
        ends = table[:, 0].cumsum(0)
        layout = layout_of(bits.numel(), int(ends[-1]) if chunks else 0, dtype)
        table[:, 0] = ends - table[:, 0]
        packed = room[: layout.stored_bytes].zero_()
        packed[:HEADER_BYTES].copy_(header(layout))
        if chunks:
            packed[layout.table :][: table.nbytes].copy_(table.view(torch.uint8).view(-1))
            encode_kernel[(chunks,)](
                bits,
                table,
                packed[layout.fractions :],
                packed[layout.planes :][: layout.plane_bytes].view(torch.int32),
                packed[layout.escape_list :],
                bits.numel(),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                QUAD=QUAD,
                WINDOW=WINDOW,
                ESCAPE=ESCAPE,
                LOW_BITS=low_bits,
                num_warps=ENCODE_WARPS,
            )
        return layout

    def decode(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Restore `packed` of `layout`, which was checked when it was made, into `out` on the current stream.

        Raises ValueError for memory too small.
        """
        quads = -(-layout.elements // QUAD)
        if packed.numel() < layout.stored_bytes or out.numel() < 2 * QUAD * quads:
            raise ValueError(f"{packed.numel()} packed bytes and room for {out.numel()} do not fit {layout}")
        if layout.chunks == 0:
            return
        decode_kernel[(layout.chunks,)](
            packed[layout.table :][: layout.chunks * CHUNK_ENTRY_BYTES].view(torch.int32),
            packed[layout.fractions :][: QUAD * quads].view(torch.int32),
            packed[layout.planes :][: layout.plane_bytes].view(torch.int32),
            packed[layout.escape_list :],
            out[: 2 * QUAD * quads].view(torch.int64),
            quads,
            layout.escapes,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            LOW_BITS=layout.format.low_bits,
            num_warps=DECODE_WARPS,
        )
