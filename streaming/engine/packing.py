"""The packed form of a bf16 weight: every bit kept, about 0.70 of the bytes. Plain torch, for any device.

In: bf16 bit patterns. Out: one run of bytes, and back. `packing_triton` decodes the same bytes faster.

Why it is smaller: trained weights of a layer have about the same size, so of the 256 exponents a bf16 can have nearly
all weights use seven neighbouring ones. Signs and mantissas look random and travel as they are.

Version 1, little endian, for n elements in c = ceil(n / CHUNK) chunks; sections begin at multiples of 256 bytes:

    header      256 B      magic b"LSPK", version u8, 3 B zero, n u64, c u64, escapes u64, zeros
    chunks      8 B x c    first escape of the chunk u32, lowest exponent of its window u8, 3 B zero
    fractions   1 B x n    sign in bit 7, mantissa in bits 0 to 6
    codes       c x 3 planes x COLUMNS words u32
    escapes     1 B each   exponents outside their chunk's window

Four neighbouring elements are a quad; a chunk has ROWS rows of COLUMNS quads. The 3-bit code of element j of the quad
in a row and column is in bit 8 * j + row of word `column` of the three planes, lowest bit in the first, so that one
shift and one mask give a bit of each of four elements, a byte apart. Codes 0 to 6 count up from the window's lowest
exponent, 7 says that the exponent is among the escapes. Escapes are in the order of chunk, column, row, element: the
first of a column is found by a prefix sum over the columns' escape counts, far fewer than elements.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

import torch

from .codec import align

MAGIC = b"LSPK"
VERSION = 1
ROWS = 8
COLUMNS = 128
QUAD = 4
CHUNK = ROWS * COLUMNS * QUAD
WINDOW = 7
ESCAPE = 7
HEADER_BYTES = 256
CHUNK_ENTRY_BYTES = 8

# Encoding takes about 60 bytes of scratch an element; batches keep it bounded, see `SCRATCH_BYTES`.
BATCH_CHUNKS = 256
SCRATCH_BYTES = 60 * BATCH_CHUNKS * CHUNK


class CorruptPacking(ValueError):
    """The bytes are no packed weight of this version."""


class Layout(NamedTuple):
    """Where the sections of a packed weight lie, in bytes from its start."""

    elements: int
    chunks: int
    escapes: int

    @property
    def table(self) -> int:
        return HEADER_BYTES

    @property
    def fractions(self) -> int:
        return self.table + align(self.chunks * CHUNK_ENTRY_BYTES)

    @property
    def codes(self) -> int:
        return self.fractions + align(self.elements)

    @property
    def escape_list(self) -> int:
        return self.codes + align(self.chunks * 3 * COLUMNS * 4)

    @property
    def stored_bytes(self) -> int:
        return self.escape_list + align(self.escapes)


def layout_of(elements: int, escapes: int) -> Layout:
    return Layout(elements, -(-elements // CHUNK), escapes)


def worst_bytes(elements: int) -> int:
    """Bytes that suffice for any weight of so many elements: every exponent an escape."""
    return layout_of(elements, elements).stored_bytes


class Packer(Protocol):
    """What packs and restores on one kind of device; all of them make the same bytes."""

    def encode(self, raw: torch.Tensor, room: torch.Tensor) -> Layout:
        """Pack bf16 patterns `raw` (uint8, whole quads) into the beginning of `room` (uint8, `worst_bytes`)."""

    def decode(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        """Restore into `out` (uint8, room for whole quads) on the stream that computes now."""


class PlainPacker:
    """The packer of any device: slow, and waits for the device."""

    def encode(self, raw: torch.Tensor, room: torch.Tensor) -> Layout:
        packed = pack(raw.view(torch.bfloat16))
        room[: packed.numel()].copy_(packed)
        return read_layout(packed)

    def decode(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
        out[: 2 * layout.elements].copy_(unpack(packed[: layout.stored_bytes]).view(torch.uint8))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack `weight` (bf16, any shape) into uint8 [stored_bytes] on its device.

    Raises TypeError for another dtype. Needs at most `SCRATCH_BYTES` of memory besides input and output.
    """
    if weight.dtype is not torch.bfloat16:
        raise TypeError(f"only bfloat16 is packed, not {weight.dtype}")
    bits = weight.detach().contiguous().view(torch.int16).reshape(-1)
    batches = [_pack_chunks(batch) for batch in bits.split(BATCH_CHUNKS * CHUNK)]
    layout = layout_of(bits.numel(), sum(batch.escapes.numel() for batch in batches))
    packed = torch.zeros(layout.stored_bytes, dtype=torch.uint8, device=bits.device)
    packed[:HEADER_BYTES].copy_(header(layout))
    table = packed[layout.table :][: layout.chunks * CHUNK_ENTRY_BYTES].view(layout.chunks, CHUNK_ENTRY_BYTES)
    codes = packed[layout.codes :][: layout.chunks * 3 * COLUMNS * 4].view(torch.int32).view(-1, 3, COLUMNS)
    chunk, escape = 0, 0
    for number, batch in enumerate(batches):
        count = batch.lowest.numel()
        start = layout.fractions + number * BATCH_CHUNKS * CHUNK
        packed[start : start + batch.fractions.numel()] = batch.fractions
        table[chunk : chunk + count, :4] = (batch.first_escapes + escape).to(torch.int32).view(torch.uint8).view(-1, 4)
        table[chunk : chunk + count, 4] = batch.lowest.to(torch.uint8)
        codes[chunk : chunk + count] = batch.codes
        start = layout.escape_list + escape
        packed[start : start + batch.escapes.numel()] = batch.escapes
        chunk, escape = chunk + count, escape + batch.escapes.numel()
    return packed


class _Batch(NamedTuple):
    fractions: torch.Tensor
    lowest: torch.Tensor
    first_escapes: torch.Tensor
    codes: torch.Tensor
    escapes: torch.Tensor


def _pack_chunks(bits: torch.Tensor) -> _Batch:
    """Pack int16 patterns [n], n at most a batch; the last chunk may be short."""
    fractions = ((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8)
    chunks = -(-bits.numel() // CHUNK)
    exponents = (bits >> 7) & 0xFF
    lowest = _windows(exponents, chunks)
    codes = exponents - lowest.repeat_interleave(CHUNK)[: bits.numel()]
    codes = torch.where((codes >= 0) & (codes < WINDOW), codes, ESCAPE)
    missing = chunks * CHUNK - bits.numel()
    # What pads the last chunk must not look like an escape.
    codes = _by_column(torch.nn.functional.pad(codes, (0, missing)), chunks)
    exponents = _by_column(torch.nn.functional.pad(exponents, (0, missing)), chunks)
    places = _bit_places(bits.device)
    planes = [(((codes >> plane) & 1).to(torch.int64) << places).sum(dim=(2, 3)) for plane in range(3)]
    is_escape = codes == ESCAPE
    counts = is_escape.sum(dim=(1, 2, 3))
    return _Batch(
        fractions,
        lowest,
        counts.cumsum(0) - counts,
        torch.stack(planes, dim=1).to(torch.int32),
        exponents[is_escape].to(torch.uint8),
    )


def _by_column(elements: torch.Tensor, chunks: int) -> torch.Tensor:
    """View elements [chunks * CHUNK] as [chunks, COLUMNS, ROWS, QUAD], the order in which escapes are listed."""
    return elements.view(chunks, ROWS, COLUMNS, QUAD).transpose(1, 2)


def _bit_places(device: torch.device) -> torch.Tensor:
    """Which bit of its column's word belongs to an element: int64 [ROWS, QUAD]."""
    row = torch.arange(ROWS, device=device).view(ROWS, 1)
    return row + 8 * torch.arange(QUAD, device=device)


def _windows(exponents: torch.Tensor, chunks: int) -> torch.Tensor:
    """For each chunk the lowest exponent of the seven neighbours that hold most of it: int16 [chunks]."""
    chunk_of = torch.arange(exponents.numel(), device=exponents.device) // CHUNK
    counts = torch.bincount(chunk_of * 256 + exponents, minlength=chunks * 256).view(chunks, 256)
    sums = torch.nn.functional.pad(counts.cumsum(dim=1), (1, 0))
    return (sums[:, WINDOW:] - sums[:, :-WINDOW]).argmax(dim=1).to(torch.int16)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Give back the bf16 weight, flat [n], from `packed` (uint8, any device), whatever follows it there.

    Raises CorruptPacking when the bytes contradict themselves; nothing outside `packed` is ever read.
    """
    layout = read_layout(packed)
    table = packed[layout.table :][: layout.chunks * CHUNK_ENTRY_BYTES].reshape(layout.chunks, CHUNK_ENTRY_BYTES)
    first_escapes = table[:, :4].contiguous().view(torch.int32).view(-1)
    planes = packed[layout.codes :][: layout.chunks * 3 * COLUMNS * 4].clone().view(torch.int32).to(torch.int64)
    planes = planes.view(layout.chunks, 3, COLUMNS, 1, 1)
    places = _bit_places(packed.device)
    codes = ((planes[:, 0] >> places) & 1) + 2 * ((planes[:, 1] >> places) & 1) + 4 * ((planes[:, 2] >> places) & 1)
    is_escape = codes == ESCAPE
    counts = is_escape.sum(dim=(1, 2, 3))
    if not torch.equal(first_escapes.to(torch.int64), counts.cumsum(0) - counts):
        raise CorruptPacking("the chunk table does not match the escapes")
    if int(counts.sum()) != layout.escapes:
        raise CorruptPacking(f"{int(counts.sum())} escapes are used, the header says {layout.escapes}")
    exponents = (codes + table[:, 4].to(torch.int64).view(-1, 1, 1, 1)) & 0xFF
    exponents[is_escape] = packed[layout.escape_list :][: layout.escapes].to(torch.int64)
    exponents = exponents.transpose(1, 2).reshape(-1)[: layout.elements].to(torch.int32)
    fractions = packed[layout.fractions :][: layout.elements].to(torch.int32)
    bits = (fractions & 0x80) << 8 | exponents << 7 | fractions & 0x7F
    return bits.to(torch.int16).view(torch.bfloat16)


def header(layout: Layout) -> torch.Tensor:
    fixed = struct.pack("<4sB3xQQQ", MAGIC, VERSION, *layout)
    return torch.frombuffer(bytearray(fixed.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def read_layout(packed: torch.Tensor) -> Layout:
    """Check the header of `packed` against its size and give where everything lies.

    Raises CorruptPacking.
    """
    if packed.numel() < HEADER_BYTES:
        raise CorruptPacking(f"{packed.numel()} bytes are too few for a header")
    head = packed[:HEADER_BYTES].cpu().numpy().tobytes()
    magic, version, elements, chunks, escapes = struct.unpack_from("<4sB3xQQQ", head)
    if magic != MAGIC or version != VERSION:
        raise CorruptPacking(f"not a packed weight of version {VERSION}: it begins with {head[:5]!r}")
    layout = layout_of(elements, escapes)
    if chunks != layout.chunks or escapes > elements or layout.stored_bytes > packed.numel():
        raise CorruptPacking(
            f"the header speaks of {elements} elements in {chunks} chunks with {escapes} escapes, which do not fit "
            f"{packed.numel()} bytes"
        )
    return layout
