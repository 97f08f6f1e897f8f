"""Writes GGUF files of random weights: whole blocks of random codes, with scales that give values the layout's spread.

In: a list of `TensorLayout`. Out: one file, complete or absent. As the published files have it, biases and gains are
F32, the layers in `exact` BF16, and everything else is of one quantised kind.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy
from gguf import GGMLQuantizationType as Kind

from .layouts.tensors import TensorLayout

# Where a block has the float16 that multiplies its codes, and the one of its minimum: ggml-common.h.
SCALES: dict[str, tuple[int, int | None]] = {
    "Q8_0": (0, None),
    "Q4_0": (0, None),
    "Q4_1": (0, 2),
    "Q5_0": (0, None),
    "Q5_1": (0, 2),
    "IQ4_NL": (0, None),
    "Q2_K": (80, 82),
    "Q3_K": (108, None),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, None),
    "IQ4_XS": (0, None),
}
SAMPLE_BLOCKS = 512

# The layers where FLUX begins and ends, which the usual converters do not quantise.
FLUX_EXACT = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")


def write_random_gguf(
    path: Path,
    tensors: Sequence[TensorLayout],
    kind: str,
    *,
    architecture: str,
    exact: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write `tensors` to `path`, replacing it, and return `path`. `exact` are beginnings of names.

    Raises:
        ValueError: `kind` is none of SCALES, or a row of a tensor is not whole blocks of it.
    """
    if kind not in SCALES:
        raise ValueError(f"no random blocks of {kind}: choose one of {', '.join(SCALES)}")
    kinds = [_kind_of(tensor, Kind[kind], exact) for tensor in tensors]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name first: an interrupted run must not leave a file that looks complete.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(unfinished, architecture)
    try:
        for tensor, own in zip(tensors, kinds, strict=True):
            shape = _byte_shape(tensor, own)
            writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), int(numpy.prod(shape)), own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        scales = _scales(kind)
        for tensor, own in zip(tensors, kinds, strict=True):
            chance = numpy.random.default_rng(zlib.crc32(tensor.name.encode(), seed))
            writer.write_tensor_data(_random_bytes(tensor, own, scales, chance))
        writer.close()
        unfinished.replace(path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
    return path


def _kind_of(tensor: TensorLayout, kind: Kind, exact: Sequence[str]) -> Kind:
    if len(tensor.shape) == 1:
        return Kind.F32
    return Kind.BF16 if tensor.name.startswith(tuple(exact)) else kind


def _byte_shape(tensor: TensorLayout, kind: Kind) -> tuple[int, ...]:
    elements, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    *rows, width = tensor.shape
    if width % elements:
        raise ValueError(f"`{tensor.name}` has rows of {width}, no whole blocks of {kind.name}, of {elements} each")
    return *rows, width // elements * size_bytes


def _random_bytes(
    tensor: TensorLayout, kind: Kind, scales: tuple[float, float], chance: numpy.random.Generator
) -> numpy.ndarray:
    shape = _byte_shape(tensor, kind)
    if kind.name not in SCALES:
        values = tensor.center + tensor.spread * chance.standard_normal(tensor.shape, numpy.float32)
        return gguf.quants.quantize(values.astype(numpy.float32), kind).view(numpy.uint8).reshape(shape)
    blocks = chance.integers(0, 256, shape, numpy.uint8).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    return _scaled(blocks, kind.name, *(scale * tensor.spread for scale in scales)).reshape(shape)


def _scaled(blocks: numpy.ndarray, kind: str, scale: float, least: float) -> numpy.ndarray:
    """Write the two numbers into each of `blocks`, which are changed and returned."""
    for place, number in zip(SCALES[kind], (scale, least), strict=True):
        if place is not None:
            blocks[:, place : place + 2] = numpy.frombuffer(numpy.float16(number).tobytes(), numpy.uint8)
    return blocks


def _scales(kind: str) -> tuple[float, float]:
    """Scale and minimum with which random codes have a mean of zero, or nearly so, and a deviation of one."""
    size_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    codes = numpy.random.default_rng(0).integers(0, 256, (SAMPLE_BLOCKS, size_bytes), numpy.uint8)
    values, minima = (
        gguf.quants.dequantize(_scaled(codes, kind, *numbers).reshape(1, -1), Kind[kind])
        for numbers in ((1, 0), (0, 1))
    )
    least = 0.0 if SCALES[kind][1] is None else -float(values.mean() / minima.mean())
    deviation = float((values + least * minima).std())
    return 1 / deviation, least / deviation
