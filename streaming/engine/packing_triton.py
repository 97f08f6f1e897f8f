"""The fast decoder of packed weights, as a Triton kernel. The format and its plain twin are in `packing`.

In: packed bytes on a CUDA device. Out: bf16 written into memory the caller gives. One program decodes one chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .packing import CHUNK, CHUNK_ENTRY_BYTES, COLUMNS, ESCAPE, ROWS, Layout

WARPS = 4


@triton.jit
def _count_bits(word):
    """Number of set bits of each uint32, by the usual sums of neighbours; Triton has no portable instruction for it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def decode_kernel(
    table,  # int32 [chunks, 2]: first escape; lowest exponent in the low byte
    fractions,  # uint8 [elements]
    codes,  # int32 [chunks, 3, COLUMNS]
    escape_list,  # uint8 [escapes]
    out,  # int16 [elements]
    elements,
    escapes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ESCAPE: tl.constexpr,
):
    chunk = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    escape = tl.load(table + chunk * 2)
    lowest = tl.load(table + chunk * 2 + 1) & 0xFF
    words = codes + chunk * 3 * COLUMNS + column
    low = tl.load(words).to(tl.uint32, bitcast=True)
    middle = tl.load(words + COLUMNS).to(tl.uint32, bitcast=True)
    high = tl.load(words + 2 * COLUMNS).to(tl.uint32, bitcast=True)
    count = _count_bits(low & middle & high).to(tl.int32)
    rank = tl.cumsum(count, 0) - count + escape
    base = chunk * ROWS * COLUMNS
    for row in tl.static_range(ROWS):
        index = base + row * COLUMNS + column
        inside = index < elements
        fraction = tl.load(fractions + index, mask=inside, other=0).to(tl.int32)
        code = (((low >> row) & 1) | (((middle >> row) & 1) << 1) | (((high >> row) & 1) << 2)).to(tl.int32)
        is_escape = code == ESCAPE
        # Ranks come from the bytes; the bound holds whatever they are.
        listed = tl.load(escape_list + rank, mask=is_escape & (rank >= 0) & (rank < escapes), other=0).to(tl.int32)
        exponent = tl.where(is_escape, listed, (code + lowest) & 0xFF)
        rank += is_escape.to(tl.int32)
        bits = ((fraction & 0x80) << 8) | (exponent << 7) | (fraction & 0x7F)
        tl.store(out + index, bits.to(tl.int16), mask=inside)


def decode(packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Decode `packed` (uint8, CUDA) of `layout` into `out`, uint8 of at least 2 x elements, on the current stream.

    The layout is taken as it is: check it once with `packing.read_layout`. Raises ValueError for memory too small.
    """
    if packed.numel() < layout.stored_bytes or out.numel() < 2 * layout.elements:
        raise ValueError(f"{packed.numel()} packed bytes and room for {out.numel()} do not fit {layout}")
    if layout.chunks == 0:
        return
    table = packed[layout.table :][: layout.chunks * CHUNK_ENTRY_BYTES].view(torch.int32)
    codes = packed[layout.codes :][: layout.chunks * 3 * COLUMNS * 4].view(torch.int32)
    decode_kernel[(layout.chunks,)](
        table,
        packed[layout.fractions :],
        codes,
        packed[layout.escape_list :],
        out[: 2 * layout.elements].view(torch.int16),
        layout.elements,
        layout.escapes,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        ESCAPE=ESCAPE,
        num_warps=WARPS,
    )


assert CHUNK == ROWS * COLUMNS
