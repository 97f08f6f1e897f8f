"""The ways in which GGUF files hold numbers: how many values a block has, in how many bytes.

Source: `ggml-common.h` and `ggml.h` of ggml (block_q4_0 and so on); `gguf.GGML_QUANT_SIZES` has the same for all kinds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Kind(NamedTuple):
    """One way to hold numbers: a tensor is whole blocks, each of `elements` values in `size_bytes` bytes."""

    name: str
    elements: int
    size_bytes: int

    def stored_bytes(self, elements: int) -> int:
        """Bytes of `elements` values, which must fill whole blocks."""
        return elements // self.elements * self.size_bytes


# These are torch's own numbers.
PLAIN: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

SUPER_BLOCK = 256

_BLOCKS = (
    Kind("Q8_0", 32, 34),
    Kind("Q4_0", 32, 18),
    Kind("Q4_1", 32, 20),
    Kind("Q5_0", 32, 22),
    Kind("Q5_1", 32, 24),
    Kind("IQ4_NL", 32, 18),
    Kind("Q2_K", SUPER_BLOCK, 84),
    Kind("Q3_K", SUPER_BLOCK, 110),
    Kind("Q4_K", SUPER_BLOCK, 144),
    Kind("Q5_K", SUPER_BLOCK, 176),
    Kind("Q6_K", SUPER_BLOCK, 210),
    Kind("IQ4_XS", SUPER_BLOCK, 136),
)
# The quantised kinds that are dequantised here; the others go through the `gguf` package.
QUANTISED: dict[str, Kind] = {kind.name: kind for kind in _BLOCKS}

# What the codes of IQ4_NL and IQ4_XS stand for: `kvalues_iq4nl` in ggml-common.h.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
