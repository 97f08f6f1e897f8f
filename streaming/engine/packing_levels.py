"""Codes of three levels, and where their bits and the escapes lie in the runs, in plain torch on any device.

In: exponents, or codes, of whole chunks in the order of their places. Out: codes, counts and positions. What they mean
is in `packing_format`; `packing` writes and reads the bytes.
"""

from __future__ import annotations

import torch

from .packing_format import CHUNK, ESCAPE_BYTES, LEVEL_BITS

# An element's codes of all levels side by side, the first lowest, by how far its exponent is above its chunk's base.
SECOND = 0b11
THIRD = 0b10_11
CODE_OF = {0: 0, 1: 1, 2: 2, 3: 0b00_11, -1: 0b01_11, -2: 0b11_11}
CODE_OF |= {k: THIRD | (k + 8 if k < 0 else k + 2) << 4 for k in (*range(-8, -2), 4, 5)}
LEVEL_PLACES = (0, 2, 4)
ESCAPE = 0x80
CODES = tuple(CODE_OF.get(k, ESCAPE) for k in range(-255, 256))


def bases(exponents: torch.Tensor, missing: int) -> torch.Tensor:
    """For each chunk the base for which its elements, less zeros at the end, take the fewest bits: int64 [chunks]."""
    chunks = exponents.shape[0]
    chunk_of = torch.arange(chunks, device=exponents.device).view(-1, 1) * 256
    counts = torch.bincount((chunk_of + exponents).view(-1), minlength=chunks * 256).view(chunks, 256)
    counts[-1, 0] -= missing
    sums = torch.nn.functional.pad(counts.cumsum(1), (9, 6))
    sums[:, -6:] = sums[:, -7:-6]

    def near(least: int, most: int) -> torch.Tensor:
        """How many exponents are `least` to `most` above each base."""
        return sums[:, 9 + most :][:, :256] - sums[:, 8 + least :][:, :256]

    first, second, third = near(0, 2), near(-2, 3), near(-8, 5)
    # What is outside all levels takes the bits of an escape; what is within them is spared some or all of that.
    spared = (8 * ESCAPE_BYTES - LEVEL_BITS[1] - LEVEL_BITS[2]) * third + LEVEL_BITS[2] * second + LEVEL_BITS[1] * first
    return spared.argmax(dim=1)


def is_in_level(codes: torch.Tensor, level: int) -> torch.Tensor:
    """Which elements have bits of a level: those whose codes say so in the level before."""
    return codes & (1 << LEVEL_PLACES[level]) - 1 == (THIRD if level == 2 else SECOND)


def level_counts(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Elements of each chunk with a second level, with a third, and escapes."""
    second, third = is_in_level(codes, 1), is_in_level(codes, 2)
    return second.sum(1), third.sum(1), (codes == ESCAPE).sum(1)


def run_words(second: torch.Tensor, third: torch.Tensor, escapes: torch.Tensor) -> torch.Tensor:
    """Words that each chunk's second level, third level and escapes take, from how many they are: [chunks, 3]."""
    second_words, third_words = LEVEL_BITS[1] * ((second + 31) // 32), LEVEL_BITS[2] * ((third + 31) // 32)
    listed = torch.where(escapes == CHUNK, CHUNK, ESCAPE_BYTES * escapes)
    return torch.stack([second_words, third_words, (listed + 3) // 4], dim=1)


def run_starts(words: torch.Tensor) -> torch.Tensor:
    """Where those begin: [chunks, 3]."""
    return (words.view(-1).cumsum(0) - words.view(-1)).view(-1, 3)


def run_bits(mask: torch.Tensor, counts: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The elements of a level, of which chunks have `counts`; each one's bit in the first run; bits from run to run.

    The elements are counted through all chunks, all int64.
    """
    found = mask.view(-1).nonzero().view(-1)
    chunk = found // CHUNK
    return found, starts[chunk] * 32 + ranks(chunk, counts), ((counts + 31) // 32 * 32)[chunk]


def ranks(chunk: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which of its chunk each is, of elements in order."""
    return torch.arange(chunk.numel(), device=chunk.device) - (counts.cumsum(0) - counts)[chunk]


def escape_bytes(chunk: torch.Tensor, counts: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For escapes of chunks, in order, the bytes in the runs of their exponents and of their places, -1 for none."""
    rank, begin, has_place = ranks(chunk, counts), 4 * starts[chunk], counts[chunk] != CHUNK
    return begin + rank + 2 * counts[chunk] * has_place, torch.where(has_place, begin + 2 * rank, -1)
