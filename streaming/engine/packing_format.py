"""The bytes of a packed 16-bit weight: every bit kept, about 0.67 of the bytes of bf16 and 0.86 of fp16.

In: how many elements of what dtype, and how far they pack. Out: where everything lies. `packing` writes and reads these
bytes in plain torch, `packing_triton` on a card.

Why it is smaller: trained weights of a layer have about the same size, so of all exponents a few neighbouring ones are
most of them. Those take two bits, their neighbours four, and some further ones seven. Signs and mantissas look random
and travel as they are. That leaves less to win in fp16, which has fewer exponents and more mantissa, and less still in
fp32 (0.83), in which diffusion models rarely keep weights: left out.

Version 1, little endian, for n elements in c = ceil(n / CHUNK) chunks; sections begin at multiples of 256 bytes:

    header      256 B      magic b"LSPK", version u8, dtype u8, 2 B zero, n u64, c u64, words u64, zeros
    chunks      12 B x c   first word of its runs u32, elements of its second level u16, of its third u16,
                           escapes u16, base exponent less 8 i16
    fractions   1 B x n    sign in bit 7, the highest 7 bits of the mantissa in bits 0 to 6
    planes      c x planes x COLUMNS words u32: two of codes, then those of the other mantissa bits, 3 for fp16
    runs        words u32, the last SPARE_WORDS of them zero

Four neighbouring elements are a quad, a word of fractions, whose elements 0 to 3 have the bytes, called lanes, 0, 2, 1
and 3: so the two halves of an output word need no bytes moved between them. A chunk has ROWS rows of COLUMNS quads. The
place of an element in its chunk is 32 * column + 8 * lane + row; a plane has one bit of each, in words as they are
counted. The lowest bit of a value is in the first plane.

An exponent is its chunk's base plus k. Codes of three levels say k:

    first     2 bits   0 to 2 are k; 3 is told by the second level
    second    2 bits   0: 3, 1: -1, 3: -2; 2 is told by the third level
    third     3 bits   0 to 5: code - 8; 6 and 7: code - 2

The second and third level have bits only for the elements that need them, in the order of their places. A chunk's runs
begin at its first word: the bits of its second level, lowest first, each in whole words; those of its third; then its
escapes, exponents that no code reaches: places u16, in order, then exponents u8, to a whole word. The codes of escapes
are those of k = 0. Where runs would take more than a byte an element, all CHUNK elements are escapes, without places.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from .codec import align

HEADER_FIELDS = "<4sBB2xQQQ"
MAGIC = b"LSPK"
VERSION = 1
ROWS = 8
COLUMNS = 128
QUAD = 4
LANES = (0, 2, 1, 3)
CHUNK = ROWS * COLUMNS * QUAD
LEVEL_BITS = (2, 2, 3)
ESCAPE_BYTES = 3
SPARE_WORDS = 2  # a decoder may read the word after a run
HEADER_BYTES = 256
CHUNK_ENTRY_BYTES = 12


class CorruptPacking(ValueError):
    """The bytes are no packed weight of this version."""


class Format(NamedTuple):
    """How the bits of a dtype are divided; `number` is its name in the header."""

    number: int
    exponent_bits: int
    low_bits: int
    """Mantissa bits that no fraction byte has room for."""
    expected_share: float
    """Measured on normal weights of spread 0.02."""

    @property
    def planes(self) -> int:
        return LEVEL_BITS[0] + self.low_bits


FORMATS = {torch.bfloat16: Format(0, 8, 0, 0.670), torch.float16: Format(1, 5, 3, 0.857)}
PACKABLE: tuple[torch.dtype, ...] = tuple(FORMATS)


def expected_share(dtype: torch.dtype) -> float:
    """The share of its bytes that a typical trained weight of a packable `dtype` packs to."""
    return FORMATS[dtype].expected_share


class Layout(NamedTuple):
    """Where the sections of a packed weight lie, in bytes from its start."""

    elements: int
    chunks: int
    words: int
    dtype: torch.dtype

    @property
    def format(self) -> Format:
        return FORMATS[self.dtype]

    @property
    def table(self) -> int:
        return HEADER_BYTES

    @property
    def table_bytes(self) -> int:
        return self.chunks * CHUNK_ENTRY_BYTES

    @property
    def fractions(self) -> int:
        return self.table + align(self.table_bytes)

    @property
    def quads(self) -> int:
        return -(-self.elements // QUAD)

    @property
    def planes(self) -> int:
        return self.fractions + align(self.quads * QUAD)

    @property
    def plane_bytes(self) -> int:
        return self.chunks * self.format.planes * COLUMNS * 4

    @property
    def runs(self) -> int:
        return self.planes + align(self.plane_bytes)

    @property
    def stored_bytes(self) -> int:
        return self.runs + align(self.words * 4)


def layout_of(elements: int, run_words: int, dtype: torch.dtype) -> Layout:
    """The layout for `run_words` words of all chunks' runs."""
    return Layout(elements, -(-elements // CHUNK), run_words + SPARE_WORDS, dtype)


def worst_bytes(elements: int, dtype: torch.dtype) -> int:
    """Bytes that suffice for any weight of so many elements: every exponent an escape."""
    return layout_of(elements, -(-elements // CHUNK) * (CHUNK // 4), dtype).stored_bytes


def header(layout: Layout) -> torch.Tensor:
    counts = (layout.elements, layout.chunks, layout.words)
    fixed = struct.pack(HEADER_FIELDS, MAGIC, VERSION, layout.format.number, *counts)
    return torch.frombuffer(bytearray(fixed.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def read_layout(packed: torch.Tensor) -> Layout:
    """Check the header of `packed` against its size and give where everything lies.

    Raises CorruptPacking.
    """
    if packed.numel() < HEADER_BYTES:
        raise CorruptPacking(f"{packed.numel()} bytes are too few for a header")
    head = packed[:HEADER_BYTES].cpu().numpy().tobytes()
    magic, version, number, elements, chunks, words = struct.unpack_from(HEADER_FIELDS, head)
    dtype = {form.number: dtype for dtype, form in FORMATS.items()}.get(number)
    if magic != MAGIC or version != VERSION or dtype is None:
        raise CorruptPacking(f"not a packed weight of version {VERSION}: it begins with {head[:6]!r}")
    layout = layout_of(elements, words - SPARE_WORDS, dtype)
    if chunks != layout.chunks or words < SPARE_WORDS or layout.stored_bytes > packed.numel():
        raise CorruptPacking(
            f"the header speaks of {elements} elements in {chunks} chunks with {words} words of runs, which do not fit "
            f"{packed.numel()} bytes"
        )
    return layout
