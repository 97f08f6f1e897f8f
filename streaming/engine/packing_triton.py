"""Restores packed weights on a card by a Triton kernel. The format is in `packing_format`, the plain twin in `packing`.

In: packed bytes on a CUDA device. Out: bit patterns in memory the caller gives. One program works on one chunk.

Integer arithmetic would bound restoring before memory did. So columns' words are brought to the same few planes
whatever the level of their codes, and a row of quads is then made from bytes, four elements at once. Escapes are few
and are written over what the rest left in their places. LOW_BITS, a format's mantissa bits outside the fraction byte,
is 0 for bf16, which has no instruction for them then, and 3 for fp16.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl

from .packing import Decoder
from .packing_bits import count_bits, flipped, fours, lane_counts, lane_moves, lane_reach, spread
from .packing_encode import encode
from .packing_format import CHUNK, COLUMNS, HEADER_BYTES, QUAD, Layout, worst_bytes
from .triton_launch import Launcher, can_launch, variant_of

logger = logging.getLogger("layerstream")

# One warp a chunk and four columns a thread, so that no warp waits for another. An H200 then makes 2.27 to 2.33 TB/s of
# bf16, reading and writing at 0.92 to 0.93 of the rate of its copies; four warps were slower.
DECODE_WARPS = 1


@triton.jit
def _load_plane(planes, number: tl.constexpr, column):
    return tl.load(planes + number * column.shape[0] + column).to(tl.uint32, bitcast=True)


@triton.jit
def _load_run(runs, word, shift, words):
    """32 bits from bit `shift` of each `word` on; within `words`, of which there are two at least, whatever it says."""
    word = tl.minimum(word.to(tl.uint32, bitcast=True), (words - 2).to(tl.uint32))
    low = tl.load(runs + word).to(tl.uint32, bitcast=True)
    high = tl.load(runs + word + 1).to(tl.uint32, bitcast=True)
    return ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> shift.to(tl.uint64)).to(tl.uint32)


@triton.jit
def _load_row(fractions, first, row: tl.constexpr, quads):
    index = first + row * first.shape[0]
    return tl.load(fractions + index, mask=index < quads, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _store_row(out, first, row: tl.constexpr, quads, fraction, fours, lowest, low_fours, LOW_BITS: tl.constexpr):
    """Put the patterns of one row: lanes 0 and 2 make the first word of a quad, lanes 1 and 3 the second."""
    rest = ((fours >> (row & 4)) & 0x0F0F0F0F) + lowest
    if LOW_BITS == 0:
        one = ((fraction << 8) & 0x80008000) | ((rest << 7) & 0x7F807F80) | (fraction & 0x007F007F)
        two = (fraction & 0x80008000) | ((rest >> 1) & 0x7F807F80) | ((fraction >> 8) & 0x007F007F)
    else:
        rest = (rest << 3) | ((low_fours >> (row & 4)) & 0x07070707)
        one = ((fraction << 8) & 0x80008000) | ((rest << 7) & 0x7C007C00)
        one |= ((fraction << 3) & 0x03F803F8) | (rest & 0x00070007)
        two = (fraction & 0x80008000) | ((rest >> 1) & 0x7C007C00)
        two |= ((fraction >> 5) & 0x03F803F8) | ((rest >> 8) & 0x00070007)
    index = first + row * first.shape[0]
    both = one.to(tl.uint64) | (two.to(tl.uint64) << 32)
    tl.store(out + index, both.to(tl.int64, bitcast=True), mask=index < quads)


@triton.jit
def _patch(chunk, planes, fractions, runs, start, escapes, out, quads, words, column, LOW_BITS: tl.constexpr):
    """Put the patterns of a chunk's escapes, which are listed from the word `start` on."""
    COLUMNS: tl.constexpr = column.shape[0]
    is_whole = escapes == 32 * COLUMNS
    end = tl.where(is_whole, escapes, 3 * escapes)
    escapes = tl.where((start >= 0) & (start <= words - ((end + 3) >> 2)), escapes, 0)
    places = (runs + start).to(tl.pointer_type(tl.uint16))
    exponents = (runs + start).to(tl.pointer_type(tl.uint8)) + tl.where(is_whole, 0, 2 * escapes)
    number = 0
    while number < escapes:
        index = number + column
        is_there = index < escapes
        place = tl.load(places + index, mask=is_there & (escapes != 32 * COLUMNS), other=0).to(tl.int32)
        place = tl.where(is_whole, index, place)
        exponent = tl.load(exponents + index, mask=is_there, other=0).to(tl.int32)
        lane = (place >> 3) & 3
        quad = (chunk * 8 + (place & 7)) * COLUMNS + (place >> 5)
        is_there &= (place < 32 * COLUMNS) & (quad < quads)
        fraction = tl.load(fractions.to(tl.pointer_type(tl.uint8)) + quad * 4 + lane, mask=is_there, other=0)
        fraction = fraction.to(tl.int32)
        pattern = ((fraction & 0x80) << 8) | (exponent << (7 + LOW_BITS)) | ((fraction & 0x7F) << LOW_BITS)
        for bit in tl.static_range(LOW_BITS):
            word = tl.load(planes + (2 + bit) * COLUMNS + (place >> 5), mask=is_there, other=0)
            pattern |= ((word >> (place & 31)) & 1) << bit
        element = quad * 4 + (((lane & 1) << 1) | (lane >> 1))
        tl.store(out.to(tl.pointer_type(tl.int16)) + element, pattern.to(tl.int16), mask=is_there)
        number += COLUMNS


def trial(dtype: torch.dtype) -> torch.Tensor:
    """Values of `dtype` with codes of every kind: each pattern, those of an exponent together; a chunk with all of the
    exponents; and normal ones.
    """
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    by_exponent = patterns[(patterns & 0x7FFF).sort(stable=True).indices]
    all_exponents = patterns[:: (1 << 16) // CHUNK]
    # A generator of its own: noise that samplers draw must not depend on this.
    normal = torch.randn(2 * CHUNK, generator=torch.Generator().manual_seed(0))
    return torch.cat([by_exponent.view(dtype), all_exponents.view(dtype), normal.to(dtype)])


# Compiled once a dtype, whether or not `words` happens to be a multiple of 16.
@triton.jit(do_not_specialize=["words"])
def decode_kernel(
    packed,  # uint8
    fractions_start,
    planes_start,
    runs_start,
    out,  # uint8
    quads,
    words,
    TABLE_START: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    # Views of the sections would take the host longer than the launch.
    table = (packed + TABLE_START).to(tl.pointer_type(tl.int32))
    fractions = (packed + fractions_start).to(tl.pointer_type(tl.int32))
    planes = (packed + planes_start).to(tl.pointer_type(tl.int32))
    runs = (packed + runs_start).to(tl.pointer_type(tl.int32))
    out = out.to(tl.pointer_type(tl.int64))
    chunk = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    first = chunk * (8 * COLUMNS) + column
    planes += chunk * (2 + LOW_BITS) * COLUMNS
    a, b = _load_plane(planes, 0, column), _load_plane(planes, 1, column)
    start = tl.load(table + chunk * 3)
    counts = tl.load(table + chunk * 3 + 1)
    last = tl.load(table + chunk * 3 + 2)
    # All rows are on their way before the first is stored: no load passes a store.
    row_0, row_1 = _load_row(fractions, first, 0, quads), _load_row(fractions, first, 1, quads)
    row_2, row_3 = _load_row(fractions, first, 2, quads), _load_row(fractions, first, 3, quads)
    row_4, row_5 = _load_row(fractions, first, 4, quads), _load_row(fractions, first, 5, quads)
    row_6, row_7 = _load_row(fractions, first, 6, quads), _load_row(fractions, first, 7, quads)

    second = a & b
    in_lanes = lane_counts(second)
    count = count_bits(in_lanes)
    bit = tl.cumsum(count, 0) - count
    word, shift, stride = start + (bit >> 5), bit & 31, ((counts & 0xFFFF) + 31) >> 5
    reach = lane_reach(in_lanes)
    one, two, four = lane_moves(second)
    x = spread(_load_run(runs, word, shift, words), second, reach, one, two, four)
    y = spread(_load_run(runs, word + stride, shift, words), second, reach, one, two, four)
    start += 2 * stride

    third = y & flipped(x)
    in_lanes = lane_counts(third)
    count = count_bits(in_lanes)
    bit = tl.cumsum(count, 0) - count
    word, shift, stride = start + (bit >> 5), bit & 31, (((counts >> 16) & 0xFFFF) + 31) >> 5
    reach = lane_reach(in_lanes)
    one, two, four = lane_moves(third)
    w = spread(_load_run(runs, word, shift, words), third, reach, one, two, four)
    v = spread(_load_run(runs, word + stride, shift, words), third, reach, one, two, four)
    u = spread(_load_run(runs, word + 2 * stride, shift, words), third, reach, one, two, four)
    start += 3 * stride

    # The bits of k + 8, whatever level it is from.
    q0 = (a & flipped(y)) | w
    q1 = (b & flipped(third)) | (v & flipped(u))
    q2 = x | u
    q3 = flipped(x | (third & flipped(u & v)))
    f0, f1, f2, f3 = fours(q0, q1, q2, q3)
    # Added to four bytes at once; none overflows, since an element with no exponent of its own has k = 0.
    lowest = (last >> 16).to(tl.uint32, bitcast=True) * 0x01010101
    l0, l1, l2, l3 = f0, f1, f2, f3
    if LOW_BITS != 0:
        low, middle = _load_plane(planes, 2, column), _load_plane(planes, 3, column)
        high = _load_plane(planes, 4, column)
        l0, l1, l2, l3 = fours(low, middle, high, high ^ high)
    _store_row(out, first, 0, quads, row_0, f0, lowest, l0, LOW_BITS)
    _store_row(out, first, 1, quads, row_1, f1, lowest, l1, LOW_BITS)
    _store_row(out, first, 2, quads, row_2, f2, lowest, l2, LOW_BITS)
    _store_row(out, first, 3, quads, row_3, f3, lowest, l3, LOW_BITS)
    _store_row(out, first, 4, quads, row_4, f0, lowest, l0, LOW_BITS)
    _store_row(out, first, 5, quads, row_5, f1, lowest, l1, LOW_BITS)
    _store_row(out, first, 6, quads, row_6, f2, lowest, l2, LOW_BITS)
    _store_row(out, first, 7, quads, row_7, f3, lowest, l3, LOW_BITS)
    # Other threads may have stored where escapes go: theirs must be the later store.
    tl.debug_barrier()
    _patch(chunk, planes, fractions, runs, start, last & 0xFFFF, out, quads, words, column, LOW_BITS)


class TritonPacker:
    """The packer of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._decode = Launcher(decode_kernel, num_warps=DECODE_WARPS)
        self._faults: dict[torch.dtype, str | None] = {}

    def works(self, dtype: torch.dtype) -> bool:
        """Whether Triton makes kernels here, and right ones: nobody has tried every Triton with every card. Where it
        does not, the log says why. Raises RuntimeError when the card is out of memory.
        """
        if not can_launch():
            return False
        if dtype not in self._faults:
            fault = self._faults[dtype] = self._find_fault(dtype)
            if fault is not None:
                logger.warning("LayerStream: %s weights cannot be packed here, so they travel raw: %s", dtype, fault)
        return self._faults[dtype] is None

    def _find_fault(self, dtype: torch.dtype) -> str | None:
        """Pack and restore what has codes of every kind; give what is wrong with that, if anything."""
        raw = trial(dtype).to(self._device).view(torch.uint8)
        room = torch.empty(worst_bytes(raw.numel() // 2, dtype), dtype=torch.uint8, device=self._device)
        restored = torch.zeros_like(raw)
        try:
            layout = self.encode(raw, room, dtype)
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            self.decoder(room, layout, restored)(stream)
            return None if torch.equal(restored, raw) else "what was packed came back as something else"
        except Exception as error:  # compilers and drivers raise what they like
            if "out of memory" in str(error).lower():
                raise  # the card is full, which says nothing of the kernels: they are tried again
            first_line, _, _ = str(error).partition("\n")
            return f"{type(error).__name__}: {first_line}"

    def encode(self, raw: torch.Tensor, room: torch.Tensor, dtype: torch.dtype) -> Layout:
        """Pack `raw` (uint8 over patterns of `dtype`, whole quads) into `room`; waits for the device once.

        Needs no memory besides 16 bytes a chunk. Raises ValueError when `room` is less than `worst_bytes`.
        """
        return encode(raw.view(torch.int16), room, dtype)

    def decoder(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> Decoder:
        """What restores `packed` of `layout`, which was checked when it was made, into `out` on a stream.

        Raises ValueError for memory too small, or not aligned to 16 bytes.
        """
        quads = layout.quads
        if packed.numel() < layout.stored_bytes or out.numel() < 2 * QUAD * quads:
            raise ValueError(f"{packed.numel()} packed bytes and room for {out.numel()} do not fit {layout}")
        if (packed.data_ptr() | out.data_ptr()) % 16:
            raise ValueError(f"memory at {packed.data_ptr():#x} and {out.data_ptr():#x}: both must begin at 16 bytes")
        if layout.chunks == 0:
            return lambda stream: None
        numbers = layout.fractions, layout.planes, layout.runs
        arguments = (packed, *numbers, out, quads, layout.words, HEADER_BYTES, COLUMNS, layout.format.low_bits)
        key = (packed.device, layout.format.low_bits, *map(variant_of, numbers), variant_of(quads), layout.words >> 31)
        return self._decode.prepared(layout.chunks, arguments, key)
