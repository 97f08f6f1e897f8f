"""Packs 16-bit weights and restores them, bit for bit, in plain torch on any device. The bytes are in `packing_format`.

In: bit patterns of bf16 or fp16. Out: one run of bytes, and back. Slow: `packing_triton` does the same on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from .packing_format import (
    CHUNK,
    CHUNK_ENTRY_BYTES,
    COLUMNS,
    FORMATS,
    HEADER_BYTES,
    LANES,
    LEVEL_BITS,
    PACKABLE,
    QUAD,
    ROWS,
    SPARE_WORDS,
    CorruptPacking,
    Format,
    Layout,
    expected_share,
    header,
    layout_of,
    read_layout,
    worst_bytes,
)
from .packing_levels import (
    CODE_OF,
    CODES,
    ESCAPE,
    LEVEL_PLACES,
    bases,
    escape_bytes,
    is_in_level,
    level_counts,
    ranks,
    run_bits,
    run_starts,
    run_words,
)

__all__ = [
    "PACKABLE",
    "CorruptPacking",
    "Layout",
    "Packer",
    "PlainPacker",
    "expected_share",
    "pack",
    "read_layout",
    "unpack",
    "worst_bytes",
]

# Either way takes about 60 bytes of scratch an element; batches keep it bounded.
BATCH_CHUNKS = 256


Decoder = Callable[[Any], object]
"""Starts restoring on the stream it is called with."""


class Packer(Protocol):
    """What packs and restores on one kind of device; all of them make the same bytes."""

    def works(self, dtype: torch.dtype) -> bool:
        """Whether `dtype` comes back on this machine as it was; finding out may take seconds, once."""

    def encode(self, raw: torch.Tensor, room: torch.Tensor, dtype: torch.dtype) -> Layout:
        """Pack `dtype` patterns `raw` (uint8, whole quads) into the beginning of `room` (uint8, `worst_bytes`)."""

    def decoder(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> Decoder:
        """What restores `packed` into `out` (uint8, room for whole quads), again and again while both lie there."""


class PlainPacker:
    """The packer of any device: slow, and waits for the device."""

    def works(self, dtype: torch.dtype) -> bool:
        return True

    def encode(self, raw: torch.Tensor, room: torch.Tensor, dtype: torch.dtype) -> Layout:
        packed = pack(raw.view(dtype))
        room[: packed.numel()].copy_(packed)
        return read_layout(packed)

    def decoder(self, packed: torch.Tensor, layout: Layout, out: torch.Tensor) -> Decoder:
        return lambda stream: out[: 2 * layout.elements].copy_(unpack(packed[: layout.stored_bytes]).view(torch.uint8))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack `weight` (bf16 or fp16, any shape) into uint8 [stored_bytes] on its device.

    Raises TypeError for another dtype. Needs 60 bytes an element of a batch besides input and twice the output.
    """
    if weight.dtype not in PACKABLE:
        raise TypeError(f"only bfloat16 and float16 are packed, not {weight.dtype}")
    bits = weight.detach().contiguous().view(torch.int16).reshape(-1)
    batches = [_pack_chunks(batch, FORMATS[weight.dtype]) for batch in bits.split(BATCH_CHUNKS * CHUNK) if len(batch)]
    layout = layout_of(bits.numel(), sum(batch.runs.numel() for batch in batches), weight.dtype)
    packed = torch.zeros(layout.stored_bytes, dtype=torch.uint8, device=bits.device)
    packed[:HEADER_BYTES].copy_(header(layout))
    table, fractions, planes, runs = layout.table, layout.fractions, layout.planes, layout.runs
    for batch in batches:
        batch.table[:, 0] += (runs - layout.runs) // 4
        table = _put(packed, table, batch.table)
        fractions = _put(packed, fractions, batch.fractions)
        planes = _put(packed, planes, batch.planes)
        runs = _put(packed, runs, batch.runs)
    return packed


def _put(packed: torch.Tensor, start: int, part: torch.Tensor) -> int:
    packed[start : start + part.nbytes] = part.contiguous().view(torch.uint8).reshape(-1)
    return start + part.nbytes


class _Batch(NamedTuple):
    table: torch.Tensor
    fractions: torch.Tensor
    planes: torch.Tensor
    runs: torch.Tensor


def _pack_chunks(bits: torch.Tensor, form: Format) -> _Batch:
    """Pack int16 patterns [n], n at most a batch; the last chunk may be short. Words of runs count from the batch's."""
    chunks = -(-bits.numel() // CHUNK)
    missing = chunks * CHUNK - bits.numel()
    padded = torch.nn.functional.pad(bits, (0, missing))
    patterns = _by_place(padded)
    exponents = (patterns >> (15 - form.exponent_bits)) & ((1 << form.exponent_bits) - 1)
    base = bases(exponents, missing)
    codes = torch.tensor(CODES, dtype=torch.uint8, device=bits.device)[exponents + (255 - base).view(-1, 1)]
    codes *= _by_place(torch.arange(padded.numel(), device=bits.device) < bits.numel())
    is_whole = run_words(*level_counts(codes)).sum(1) > CHUNK // 4
    codes = torch.where(is_whole.view(-1, 1), ESCAPE, codes)
    counts = level_counts(codes)
    words = run_words(*counts)
    starts = run_starts(words)
    runs = torch.zeros((int(words.sum()), 32), dtype=torch.bool, device=bits.device)
    for level in (1, 2):
        found, at, strides = run_bits(is_in_level(codes, level), counts[level - 1], starts[:, level - 1])
        held = codes.view(-1)[found] >> LEVEL_PLACES[level]
        for bit in range(LEVEL_BITS[level]):
            runs.view(-1)[at + bit * strides] = (held >> bit & 1).bool()
    runs = _words(runs)
    found = (codes == ESCAPE).view(-1).nonzero().view(-1)
    at, place_at = escape_bytes(found // CHUNK, counts[2], starts[:, 2])
    run_bytes = runs.view(torch.uint8)
    run_bytes[at] = exponents.view(-1)[found].to(torch.uint8)
    with_place = (place_at >= 0).nonzero().view(-1)
    for byte in range(2):
        run_bytes[place_at[with_place] + byte] = (found[with_place] % CHUNK >> 8 * byte & 0xFF).to(torch.uint8)
    entry = [starts[:, 0], counts[0] | counts[1] << 16, counts[2] | (base - 8) << 16]
    lanes = padded.view(-1, QUAD)[: -(-bits.numel() // QUAD), list(LANES)].reshape(-1)
    return _Batch(
        torch.stack(entry, dim=1).to(torch.int32),
        ((lanes >> 8) & 0x80 | (lanes >> form.low_bits) & 0x7F).to(torch.uint8),
        torch.cat([_planes(codes, LEVEL_BITS[0]), _planes(patterns, form.low_bits)], dim=1),
        runs,
    )


def _by_place(elements: torch.Tensor) -> torch.Tensor:
    """Elements [chunks * CHUNK] as [chunks, CHUNK] in the order of their places."""
    lanes = elements.view(-1, ROWS, COLUMNS, QUAD)[..., list(LANES)]
    return lanes.permute(0, 2, 3, 1).reshape(-1, CHUNK)


def _by_element(places: torch.Tensor) -> torch.Tensor:
    """The reverse of `_by_place`."""
    lanes = places.view(-1, COLUMNS, QUAD, ROWS).permute(0, 3, 1, 2)
    return lanes[..., list(LANES)].reshape(-1)


def _words(bits: torch.Tensor) -> torch.Tensor:
    """bool [..., 32] as int32 [...], the first in the lowest bit."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits.to(torch.int32) << places).sum(-1, dtype=torch.int32)


def _planes(values: torch.Tensor, count: int) -> torch.Tensor:
    """The lowest `count` bits of values [chunks, CHUNK] as int32 [chunks, count, COLUMNS]."""
    planes = torch.empty((values.shape[0], count, COLUMNS), dtype=torch.int32, device=values.device)
    for plane in range(count):
        planes[:, plane] = _words(values.view(-1, COLUMNS, 32) >> plane & 1)
    return planes


def _values(planes: torch.Tensor) -> torch.Tensor:
    """What `_planes` was given, uint8, in all bits that it took."""
    values = torch.zeros((planes.shape[0], COLUMNS, 32), dtype=torch.uint8, device=planes.device)
    places = torch.arange(32, dtype=torch.int32, device=planes.device)
    for plane in range(planes.shape[1]):
        values |= (planes[:, plane, :, None] >> places & 1).to(torch.uint8) << plane
    return values.view(-1, CHUNK)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Give back the weight, flat [n], from `packed` (uint8, any device), whatever follows it there.

    Raises CorruptPacking when the bytes contradict themselves; nothing outside `packed` is ever read.
    """
    layout = read_layout(packed)
    table = packed[layout.table :][: layout.table_bytes].clone().view(torch.int32)
    planes = packed[layout.planes :][: layout.plane_bytes].clone().view(torch.int32)
    runs = packed[layout.runs :][: 4 * layout.words].clone().view(torch.int32)
    table, planes = table.view(-1, CHUNK_ENTRY_BYTES // 4), planes.view(-1, layout.format.planes, COLUMNS)
    rest, seen = [torch.empty(0, dtype=torch.int32, device=packed.device)], 0
    for first in range(0, layout.chunks, BATCH_CHUNKS):
        batch = slice(first, first + BATCH_CHUNKS)
        bits, words = _unpack_rest(table[batch].to(torch.int64), planes[batch], runs, seen, layout)
        rest.append(bits)
        seen += words
    if seen != layout.words - SPARE_WORDS:
        raise CorruptPacking(f"{seen} words of runs are used, the header says {layout.words - SPARE_WORDS}")
    fractions = packed[layout.fractions :][: layout.quads * QUAD].view(-1, QUAD)[:, list(LANES)].reshape(-1)
    fractions = fractions[: layout.elements].to(torch.int32)
    bits = (fractions & 0x80) << 8 | (fractions & 0x7F) << layout.format.low_bits
    bits |= torch.cat(rest)[: layout.elements]
    return bits.to(torch.int16).view(layout.dtype)


def _unpack_rest(
    entries: torch.Tensor, planes: torch.Tensor, runs: torch.Tensor, seen: int, layout: Layout
) -> tuple[torch.Tensor, int]:
    """Exponents and low bits in their places in a pattern, int32 [chunks * CHUNK], and the words of runs they took.

    `runs` are all there are, of which `seen` are the chunks' before.
    """
    form, runs = layout.format, runs[seen : layout.words - SPARE_WORDS]
    counts = (entries[:, 1] & 0xFFFF, entries[:, 1] >> 16 & 0xFFFF, entries[:, 2] & 0xFFFF)
    words = run_words(*counts)
    starts = run_starts(words)
    if not torch.equal(entries[:, 0], starts[:, 0] + seen) or int(words.sum()) > runs.numel():
        raise CorruptPacking("the chunk table does not match the runs")
    if int(counts[2].max()) > CHUNK:
        raise CorruptPacking("a chunk has more escapes than elements")
    codes = _values(planes[:, : LEVEL_BITS[0]])
    for level in (1, 2):
        mask = is_in_level(codes, level)
        if not torch.equal(mask.sum(1), counts[level - 1]):
            raise CorruptPacking(f"the chunk table does not match level {level + 1}")
        found, at, strides = run_bits(mask, counts[level - 1], starts[:, level - 1])
        for bit in range(LEVEL_BITS[level]):
            places = at + bit * strides
            held = (runs[places // 32] >> (places % 32).to(torch.int32) & 1).to(torch.uint8)
            codes.view(-1)[found] |= held << LEVEL_PLACES[level] + bit
    k = torch.zeros(256, dtype=torch.int32)
    k[list(CODE_OF.values())] = torch.tensor(list(CODE_OF), dtype=torch.int32)
    exponents = k.to(codes.device)[codes.to(torch.int64)] + 8 + (entries[:, 2:] >> 16).to(torch.int32)
    chunk = torch.arange(len(entries), device=codes.device).repeat_interleave(counts[2])
    at, place_at = escape_bytes(chunk, counts[2], starts[:, 2])
    run_bytes = runs.view(torch.uint8)
    low, high = (run_bytes[place_at.clamp_min(0) + byte].to(torch.int64) for byte in range(2))
    place = torch.where(place_at >= 0, low | high << 8, ranks(chunk, counts[2]))
    if (place >= CHUNK).any():
        raise CorruptPacking("an escape has no place in its chunk")
    exponents[chunk, place] = run_bytes[at].to(torch.int32)
    exponents &= (1 << form.exponent_bits) - 1  # corrupt ones must not reach the sign
    values = exponents << (15 - form.exponent_bits) | _values(planes[:, LEVEL_BITS[0] :])
    return _by_element(values), int(words.sum())
