"""The packed form of a 16-bit weight: every bit kept, about 0.70 of the bytes of bf16 and 0.89 of fp16. Plain torch.

In: bit patterns of bf16 or fp16. Out: one run of bytes, and back. `packing_triton` makes and reads the same faster.

Why it is smaller: trained weights of a layer have about the same size, so of all exponents nearly all weights use seven
neighbouring ones. Signs and mantissas look random and travel as they are. That is less to win in fp16, which has fewer
exponents and more mantissa, and less still in fp32 (0.85), in which diffusion models rarely keep weights: left out.

Version 1, little endian, for n elements in c = ceil(n / CHUNK) chunks; sections begin at multiples of 256 bytes:

    header      256 B      magic b"LSPK", version u8, dtype u8, 2 B zero, n u64, c u64, escapes u64, zeros
    chunks      8 B x c    first escape of the chunk u32, lowest exponent of its window u8, 3 B zero
    fractions   1 B x n    sign in bit 7, the highest 7 bits of the mantissa in bits 0 to 6
    planes      c x planes x COLUMNS words u32: three of codes, then those of the other mantissa bits, 3 for fp16
    escapes     1 B each   exponents outside their chunk's window

Four neighbouring elements are a quad; a chunk has ROWS rows of COLUMNS quads. A plane has one bit of each element: that
of element j of the quad in a row and column is bit 8 * j + row of word `column`, so that one shift and one mask give a
bit of each of four elements, a byte apart. The lowest bit is in the first plane. Codes 0 to 6 count up from the
window's lowest exponent, 7 says that the exponent is among the escapes. Escapes are in the order of chunk, column, row,
element: the first of a column is found by a prefix sum over the columns' escape counts, far fewer than elements.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

import torch

from .codec import align

HEADER_FIELDS = "<4sBB2xQQQ"
MAGIC = b"LSPK"
VERSION = 1
ROWS = 8
COLUMNS = 128
QUAD = 4
CHUNK = ROWS * COLUMNS * QUAD
WINDOW = 7
ESCAPE = 7
CODE_BITS = 3
HEADER_BYTES = 256
CHUNK_ENTRY_BYTES = 8

# Encoding takes about 60 bytes of scratch an element; batches keep it bounded, see `SCRATCH_BYTES`.
BATCH_CHUNKS = 256
SCRATCH_BYTES = 60 * BATCH_CHUNKS * CHUNK


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
        return CODE_BITS + self.low_bits

    @property
    def exponents(self) -> int:
        return 1 << self.exponent_bits


FORMATS = {torch.bfloat16: Format(0, 8, 0, 0.700), torch.float16: Format(1, 5, 3, 0.887)}
PACKABLE: tuple[torch.dtype, ...] = tuple(FORMATS)


def expected_share(dtype: torch.dtype) -> float:
    """The share of its bytes that a typical trained weight of a packable `dtype` packs to."""
    return FORMATS[dtype].expected_share


class Layout(NamedTuple):
    """Where the sections of a packed weight lie, in bytes from its start."""

    elements: int
    chunks: int
    escapes: int
    dtype: torch.dtype

    @property
    def format(self) -> Format:
        return FORMATS[self.dtype]

    @property
    def table(self) -> int:
        return HEADER_BYTES

    @property
    def fractions(self) -> int:
        return self.table + align(self.chunks * CHUNK_ENTRY_BYTES)

    @property
    def planes(self) -> int:
        return self.fractions + align(self.elements)

    @property
    def escape_list(self) -> int:
        return self.planes + align(self.plane_bytes)

    @property
    def plane_bytes(self) -> int:
        return self.chunks * self.format.planes * COLUMNS * 4

    @property
    def stored_bytes(self) -> int:
        return self.escape_list + align(self.escapes)


def layout_of(elements: int, escapes: int, dtype: torch.dtype) -> Layout:
    return Layout(elements, -(-elements // CHUNK), escapes, dtype)


def worst_bytes(elements: int, dtype: torch.dtype) -> int:
    """Bytes that suffice for any weight of so many elements: every exponent an escape."""
    return layout_of(elements, elements, dtype).stored_bytes


class Packer(Protocol):
    """What packs and restores on one kind of device; all of them make the same bytes."""

    def encode(self, raw: torch.Tensor, room: torch.Tensor, dtype: torch.dtype) -> Layout:
        """Pack `dtype` patterns `raw` (uint8, whole quads) into the beginning of `room` (uint8, `worst_bytes`)."""

    def decode(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Restore into `out` (uint8, room for whole quads) on the stream that computes now."""


class PlainPacker:
    """The packer of any device: slow, and waits for the device."""

    def encode(self, raw: torch.Tensor, room: torch.Tensor, dtype: torch.dtype) -> Layout:
        packed = pack(raw.view(dtype))
        room[: packed.numel()].copy_(packed)
        return read_layout(packed)

    def decode(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        out[: 2 * layout.elements].copy_(unpack(packed[: layout.stored_bytes]).view(torch.uint8))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack `weight` (bf16 or fp16, any shape) into uint8 [stored_bytes] on its device.

    Raises TypeError for another dtype. Needs at most `SCRATCH_BYTES` of memory besides input and output.
    """
    if weight.dtype not in PACKABLE:
        raise TypeError(f"only bfloat16 and float16 are packed, not {weight.dtype}")
    form = FORMATS[weight.dtype]
    bits = weight.detach().contiguous().view(torch.int16).reshape(-1)
    batches = [_pack_chunks(batch, form) for batch in bits.split(BATCH_CHUNKS * CHUNK)]
    layout = layout_of(bits.numel(), sum(batch.escapes.numel() for batch in batches), weight.dtype)
    packed = torch.zeros(layout.stored_bytes, dtype=torch.uint8, device=bits.device)
    packed[:HEADER_BYTES].copy_(header(layout))
    table = packed[layout.table :][: layout.chunks * CHUNK_ENTRY_BYTES].view(layout.chunks, CHUNK_ENTRY_BYTES)
    planes = packed[layout.planes :][: layout.plane_bytes].view(torch.int32).view(-1, form.planes, COLUMNS)
    chunk, escape = 0, 0
    for number, batch in enumerate(batches):
        count = batch.lowest.numel()
        start = layout.fractions + number * BATCH_CHUNKS * CHUNK
        packed[start : start + batch.fractions.numel()] = batch.fractions
        table[chunk : chunk + count, :4] = (batch.first_escapes + escape).to(torch.int32).view(torch.uint8).view(-1, 4)
        table[chunk : chunk + count, 4] = batch.lowest.to(torch.uint8)
        planes[chunk : chunk + count] = batch.planes
        start = layout.escape_list + escape
        packed[start : start + batch.escapes.numel()] = batch.escapes
        chunk, escape = chunk + count, escape + batch.escapes.numel()
    return packed


class _Batch(NamedTuple):
    fractions: torch.Tensor
    lowest: torch.Tensor
    first_escapes: torch.Tensor
    planes: torch.Tensor
    escapes: torch.Tensor


def _pack_chunks(bits: torch.Tensor, form: Format) -> _Batch:
    """Pack int16 patterns [n], n at most a batch; the last chunk may be short."""
    fractions = ((bits >> 8) & 0x80 | (bits >> form.low_bits) & 0x7F).to(torch.uint8)
    chunks = -(-bits.numel() // CHUNK)
    exponents = (bits >> (15 - form.exponent_bits)) & (form.exponents - 1)
    lowest = _windows(exponents, chunks, form.exponents)
    codes = exponents - lowest.repeat_interleave(CHUNK)[: bits.numel()]
    codes = torch.where((codes >= 0) & (codes < WINDOW), codes, ESCAPE)
    missing = chunks * CHUNK - bits.numel()
    # What pads the last chunk must not look like an escape.
    codes = _by_column(torch.nn.functional.pad(codes, (0, missing)), chunks)
    exponents = _by_column(torch.nn.functional.pad(exponents, (0, missing)), chunks)
    rest = _by_column(torch.nn.functional.pad(bits, (0, missing)), chunks)
    is_escape = codes == ESCAPE
    counts = is_escape.sum(dim=(1, 2, 3))
    return _Batch(
        fractions,
        lowest,
        counts.cumsum(0) - counts,
        torch.cat([_planes(codes, CODE_BITS), _planes(rest, form.low_bits)], dim=1),
        exponents[is_escape].to(torch.uint8),
    )


def _planes(values: torch.Tensor, count: int) -> torch.Tensor:
    """The lowest `count` bits of values [chunks, COLUMNS, ROWS, QUAD] as int32 [chunks, count, COLUMNS]."""
    words = torch.empty((values.shape[0], count, COLUMNS), dtype=torch.int32, device=values.device)
    places = _bit_places(values.device)
    for plane in range(count):
        words[:, plane] = (((values >> plane) & 1).to(torch.int64) << places).sum(dim=(2, 3)).to(torch.int32)
    return words


def _values(planes: torch.Tensor) -> torch.Tensor:
    """What `_planes` was given, int64, in all bits that it took."""
    words = planes.to(torch.int64)[..., None, None]
    values = torch.zeros((planes.shape[0], COLUMNS, ROWS, QUAD), dtype=torch.int64, device=planes.device)
    for plane in range(planes.shape[1]):
        values += ((words[:, plane] >> _bit_places(planes.device)) & 1) << plane
    return values


def _by_column(elements: torch.Tensor, chunks: int) -> torch.Tensor:
    """View elements [chunks * CHUNK] as [chunks, COLUMNS, ROWS, QUAD], the order in which escapes are listed."""
    return elements.view(chunks, ROWS, COLUMNS, QUAD).transpose(1, 2)


def _bit_places(device: torch.device) -> torch.Tensor:
    """Which bit of its column's word belongs to an element: int64 [ROWS, QUAD]."""
    row = torch.arange(ROWS, device=device).view(ROWS, 1)
    return row + 8 * torch.arange(QUAD, device=device)


def _windows(exponents: torch.Tensor, chunks: int, bins: int) -> torch.Tensor:
    """For each chunk the lowest exponent, of `bins`, of the seven neighbours that hold most of it: int16 [chunks]."""
    chunk_of = torch.arange(exponents.numel(), device=exponents.device) // CHUNK
    counts = torch.bincount(chunk_of * bins + exponents, minlength=chunks * bins).view(chunks, bins)
    sums = torch.nn.functional.pad(counts.cumsum(dim=1), (1, 0))
    return (sums[:, WINDOW:] - sums[:, :-WINDOW]).argmax(dim=1).to(torch.int16)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Give back the weight, flat [n], from `packed` (uint8, any device), whatever follows it there.

    Raises CorruptPacking when the bytes contradict themselves; nothing outside `packed` is ever read.
    """
    layout = read_layout(packed)
    form = layout.format
    table = packed[layout.table :][: layout.chunks * CHUNK_ENTRY_BYTES].reshape(layout.chunks, CHUNK_ENTRY_BYTES)
    first_escapes = table[:, :4].contiguous().view(torch.int32).view(-1)
    planes = packed[layout.planes :][: layout.plane_bytes].clone().view(torch.int32)
    planes = planes.view(layout.chunks, form.planes, COLUMNS)
    codes = _values(planes[:, :CODE_BITS])
    is_escape = codes == ESCAPE
    counts = is_escape.sum(dim=(1, 2, 3))
    if not torch.equal(first_escapes.to(torch.int64), counts.cumsum(0) - counts):
        raise CorruptPacking("the chunk table does not match the escapes")
    if int(counts.sum()) != layout.escapes:
        raise CorruptPacking(f"{int(counts.sum())} escapes are used, the header says {layout.escapes}")
    exponents = codes + table[:, 4].to(torch.int64).view(-1, 1, 1, 1)
    exponents[is_escape] = packed[layout.escape_list :][: layout.escapes].to(torch.int64)
    exponents &= form.exponents - 1  # corrupt ones must not reach the sign
    exponents = exponents << (15 - form.exponent_bits) | _values(planes[:, CODE_BITS:])
    fractions = packed[layout.fractions :][: layout.elements].to(torch.int32)
    bits = exponents.transpose(1, 2).reshape(-1)[: layout.elements].to(torch.int32)
    bits |= (fractions & 0x80) << 8 | (fractions & 0x7F) << form.low_bits
    return bits.to(torch.int16).view(layout.dtype)


def header(layout: Layout) -> torch.Tensor:
    counts = (layout.elements, layout.chunks, layout.escapes)
    fixed = struct.pack(HEADER_FIELDS, MAGIC, VERSION, layout.format.number, *counts)
    return torch.frombuffer(bytearray(fixed.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def read_layout(packed: torch.Tensor) -> Layout:
    """Check the header of `packed` against its size and give where everything lies.

    Raises CorruptPacking.
    """
    if packed.numel() < HEADER_BYTES:
        raise CorruptPacking(f"{packed.numel()} bytes are too few for a header")
    head = packed[:HEADER_BYTES].cpu().numpy().tobytes()
    magic, version, number, elements, chunks, escapes = struct.unpack_from(HEADER_FIELDS, head)
    dtype = {form.number: dtype for dtype, form in FORMATS.items()}.get(number)
    if magic != MAGIC or version != VERSION or dtype is None:
        raise CorruptPacking(f"not a packed weight of version {VERSION}: it begins with {head[:6]!r}")
    layout = layout_of(elements, escapes, dtype)
    if chunks != layout.chunks or escapes > elements or layout.stored_bytes > packed.numel():
        raise CorruptPacking(
            f"the header speaks of {elements} elements in {chunks} chunks with {escapes} escapes, which do not fit "
            f"{packed.numel()} bytes"
        )
    return layout
