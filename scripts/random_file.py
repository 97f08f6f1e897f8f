"""Writes safetensors files of random values, tensor by tensor, in bounded memory.

In: a list of `TensorLayout`. Out: one file, complete or absent. Values depend only on the seed, the tensor's name and
the kind of device that draws them, never on the order of writing, so several threads may share the work.

Format: https://github.com/huggingface/safetensors, section "Format": eight bytes of header length, little-endian; a
JSON header of names, types, shapes and byte ranges, padded with spaces; then the tensors without gaps.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from .layouts.tensors import TensorLayout

TYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
HEADER_ALIGNMENT_BYTES = 8
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Values drawn at once: small enough for a processor's cache, large enough to keep a GPU and its link busy."""
THREADS = {"cpu": os.cpu_count() or 1, "cuda": 8}


def write_random_file(
    path: Path,
    tensors: Sequence[TensorLayout],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cpu",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `tensors` with random values of `dtype` to `path`, replacing it, and return `path`.

    `metadata` joins the header's own. Tensors that are zero throughout become holes of the file where the file system
    has such.

    Raises:
        ValueError: `dtype` is none of bfloat16, float16, float32, float8_e4m3fn, or a name occurs twice.
    """
    if dtype not in TYPE_NAMES:
        raise ValueError(f"cannot write {dtype}: choose one of {', '.join(map(str, TYPE_NAMES))}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors of one file share a name")
    header, offsets, total_bytes = _header(tensors, dtype, metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name first: an interrupted run must not leave a file that looks complete.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            file.truncate(total_bytes)
        with ThreadPoolExecutor(THREADS[torch.device(device).type]) as pool:
            jobs = [
                pool.submit(_write_tensor, unfinished, offset, tensor, dtype, seed, torch.device(device))
                for tensor, offset in zip(tensors, offsets, strict=True)
                if tensor.center or tensor.spread
            ]
            for job in jobs:
                job.result()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _header(
    tensors: Sequence[TensorLayout], dtype: torch.dtype, metadata: Mapping[str, str]
) -> tuple[bytes, list[int], int]:
    """The file's first bytes, where each tensor starts in the file, and the file's size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    starts, position = [], 0
    for tensor in tensors:
        end = position + tensor.elements * dtype.itemsize
        entries[tensor.name] = {
            "dtype": TYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        starts.append(position)
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    header = struct.pack("<Q", len(text)) + text
    return header, [len(header) + start for start in starts], len(header) + position


def _write_tensor(
    path: Path, offset: int, tensor: TensorLayout, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    generator = torch.Generator(device).manual_seed(zlib.crc32(tensor.name.encode(), seed))
    chunk_elements = min(CHUNK_ELEMENTS[device.type], tensor.elements)
    on_card = device.type == "cuda"
    # Drawn in the file's own type where the device can, which halves its work; processors draw bfloat16 slowly.
    drawn = torch.empty(chunk_elements, dtype=dtype if on_card and dtype.itemsize > 1 else torch.float32, device=device)
    # Page-locked, the copy to RAM runs at the link's speed, and no fresh pages are touched for each chunk.
    staged = torch.empty(chunk_elements, dtype=dtype, pin_memory=on_card)
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        for start in range(0, tensor.elements, chunk_elements):
            count = min(chunk_elements, tensor.elements - start)
            drawn[:count].normal_(tensor.center, tensor.spread, generator=generator)
            staged[:count].copy_(drawn[:count])
            _write_all(file, staged[:count])


def _write_all(file: BinaryIO, values: torch.Tensor) -> None:
    """Write the bytes of `values`; an unbuffered file may take fewer at a time than it is given."""
    data: memoryview = values.view(torch.uint8).numpy().data
    while data:
        data = data[file.write(data) :]
