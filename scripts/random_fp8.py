"""Writes model files of random weights in ComfyUI's scaled fp8: the matrices of the blocks in float8_e4m3fn, each with
a scale of its own, everything else in bfloat16, and the layers' format in the header.

In: a list of `TensorLayout`. Out: one safetensors file, complete or absent, that both hosts load as it is stored. The
format is what `comfy.utils.convert_old_quants` and `comfy.ops.mixed_precision_ops` read.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from .layouts.tensors import TensorLayout

TYPE_NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
# Deviation of the codes: far enough from the largest, 448, that none is reached, and from the smallest ones.
CODE_SPREAD = 32.0
CHUNK_ELEMENTS = 1 << 25


def write_random_fp8(path: Path, tensors: Sequence[TensorLayout], *, seed: int = 0, device: str = "cpu") -> Path:
    """Write `tensors` with random values to `path`, replacing it, and return `path`.

    `device` draws the values, which depend on it, the seed and a tensor's name: "cuda" is much faster.
    """
    stored = [(tensor, torch.float8_e4m3fn if is_scaled(tensor) else torch.bfloat16) for tensor in tensors]
    scales = [_scale_of(tensor) for tensor in tensors if is_scaled(tensor)]
    header = _header([*stored, *((scale, torch.float32) for scale in scales)], [tensor for tensor, _ in stored])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name first: an interrupted run must not leave a file that looks complete.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for tensor, dtype in stored:
                _write_values(file, tensor, dtype, seed, device)
            for scale in scales:
                file.write(struct.pack("<f", scale.center))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def is_scaled(tensor: TensorLayout) -> bool:
    """Whether the tensor is in fp8: the matrices of the blocks are, and what a model begins and ends with is not."""
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight") and "_blocks." in tensor.name


def _scale_of(tensor: TensorLayout) -> TensorLayout:
    return TensorLayout(f"{tensor.name}_scale", (), tensor.spread / CODE_SPREAD, 0.0)


def _header(stored: Sequence[tuple[TensorLayout, torch.dtype]], tensors: Sequence[TensorLayout]) -> bytes:
    layers = {
        tensor.name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for tensor in tensors if is_scaled(tensor)
    }
    said = json.dumps({"format_version": "1.0", "layers": layers})
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "_quantization_metadata": said}}
    position = 0
    for tensor, dtype in stored:
        end = position + tensor.elements * dtype.itemsize
        shape = list(tensor.shape)
        entries[tensor.name] = {"dtype": TYPE_NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_values(file: BinaryIO, tensor: TensorLayout, dtype: torch.dtype, seed: int, device: str) -> None:
    generator = torch.Generator(device).manual_seed(zlib.crc32(tensor.name.encode(), seed))
    center, spread = (0.0, CODE_SPREAD) if dtype.itemsize == 1 else (tensor.center, tensor.spread)
    for start in range(0, tensor.elements, CHUNK_ELEMENTS):
        count = min(CHUNK_ELEMENTS, tensor.elements - start)
        drawn = torch.empty(count, dtype=torch.float32, device=device).normal_(center, spread, generator=generator)
        file.write(drawn.to(dtype).cpu().view(torch.uint8).numpy().data)
