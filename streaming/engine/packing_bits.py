"""Bits of words on a card: counted, and moved between the low end of a word and the places that a mask has.

All tensors are uint32. Masks are dealt with a byte at a time, four at once, which takes fewer instructions than whole
words do. `lane_moves`, `spread` and `gathered` follow Hacker's Delight, 2nd edition, 7-4 and 7-5, within each byte.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def flipped(word):
    return word ^ 0xFFFFFFFF  # Triton's interpreter has no ~ of unsigned words


@triton.jit
def lane_counts(word):
    """Set bits of each byte."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (word + (word >> 4)) & 0x0F0F0F0F


@triton.jit
def count_bits(counts):
    """Set bits of each word, int32, from `lane_counts`."""
    return ((counts * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def lane_reach(counts):
    """How far bits of byte j lie, when spread, above where they lie gathered: a byte each, from `lane_counts`."""
    return 0x18100800 - counts * 0x01010100


@triton.jit
def _parity(keep):
    """Whether the bits up to and with each are odd in number, within each byte."""
    keep ^= (keep << 1) & 0xFEFEFEFE
    keep ^= (keep << 2) & 0xFCFCFCFC
    return keep ^ ((keep << 4) & 0xF0F0F0F0)


@triton.jit
def lane_moves(mask):
    """Which bits move by one, two and four places between the low end of their byte and the places in `mask`."""
    keep = (flipped(mask) << 1) & 0xFEFEFEFE
    parity = _parity(keep)
    one = parity & mask
    mask = (mask ^ one) | (one >> 1)
    keep &= flipped(parity)
    parity = _parity(keep)
    two = parity & mask
    mask = (mask ^ two) | (two >> 2)
    keep &= flipped(parity)
    return one, two, _parity(keep) & mask


@triton.jit
def spread(bits, mask, reach, one, two, four):
    """The lowest bits of each word in the places that `mask` has, zeros elsewhere."""
    second, third, fourth = bits << ((reach >> 8) & 0xFF), bits << ((reach >> 16) & 0xFF), bits << (reach >> 24)
    bits = (bits & 0x000000FF) | (second & 0xFFFFFF00)
    bits = (bits & 0x0000FFFF) | (third & 0xFFFF0000)
    bits = (bits & 0x00FFFFFF) | (fourth & 0xFF000000)
    bits = (bits & flipped(four)) | ((bits << 4) & four)
    bits = (bits & flipped(two)) | ((bits << 2) & two)
    bits = (bits & flipped(one)) | ((bits << 1) & one)
    return bits & mask


@triton.jit
def gathered(bits, mask, reach, one, two, four):
    """The reverse: the bits in the places that `mask` has, side by side from the lowest bit on."""
    bits &= mask
    bits = (bits & flipped(one)) | ((bits & one) >> 1)
    bits = (bits & flipped(two)) | ((bits & two) >> 2)
    bits = (bits & flipped(four)) | ((bits & four) >> 4)
    second, third = (bits & 0x0000FF00) >> ((reach >> 8) & 0xFF), (bits & 0x00FF0000) >> ((reach >> 16) & 0xFF)
    return (bits & 0x000000FF) | second | third | ((bits & 0xFF000000) >> (reach >> 24))


@triton.jit
def side_by_side(even, odd):
    """Bits of two words in turn: two words with pairs of bits, those of even places and those of odd ones."""
    return (even & 0x55555555) | ((odd << 1) & 0xAAAAAAAA), ((even >> 1) & 0x55555555) | (odd & 0xAAAAAAAA)


@triton.jit
def pairs_side_by_side(low, high):
    """The same of pairs of bits: fours, of every other pair."""
    return (low & 0x33333333) | ((high << 2) & 0xCCCCCCCC), ((low >> 2) & 0x33333333) | (high & 0xCCCCCCCC)


@triton.jit
def fours(first, second, third, fourth):
    """Transposes four planes: the bits of place p of a byte lie in word p mod 4, in one half of the byte."""
    low_even, low_odd = side_by_side(first, second)
    high_even, high_odd = side_by_side(third, fourth)
    place_0, place_2 = pairs_side_by_side(low_even, high_even)
    place_1, place_3 = pairs_side_by_side(low_odd, high_odd)
    return place_0, place_1, place_2, place_3
