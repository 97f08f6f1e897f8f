"""Which tensors ComfyUI, or LayerStream's own loaders, have mapped from a file, and where in it they are.

In: tensors as a model or a LoRA holds them. Out: answers; nothing is read.
"""

from __future__ import annotations

import torch

from ..engine.mapped import FileSlice
from ..formats.gguf_file import MAPPED_FILE as GGUF_FILE
from ..formats.gguf_tensor import GgufTensor

# Where newer versions of ComfyUI note, at a storage that they map, of which file it is.
COMFY_FILE = "_comfy_tensor_file_slice"


def is_mapped(tensor: torch.Tensor) -> bool:
    """True for a weight that is mapped from its file: its pages cost nothing that the system cannot take back."""
    if tensor.is_meta:
        return True
    storage = _plain(tensor).untyped_storage()
    return hasattr(storage, COMFY_FILE) or hasattr(storage, GGUF_FILE)


def file_of(tensor: torch.Tensor) -> FileSlice | None:
    """Where in its file a weight lies that is mapped; None for any other, and where pieces of it are scattered."""
    plain = _plain(tensor)
    if plain.is_meta or not plain.is_contiguous():
        return None
    begin, storage = int(plain.storage_offset()) * plain.itemsize, plain.untyped_storage()
    gguf_file, where = getattr(storage, GGUF_FILE, None), getattr(storage, COMFY_FILE, None)
    if gguf_file is not None:
        return FileSlice(gguf_file.fileno(), begin, plain.nbytes, plain.data_ptr())
    if where is not None and isinstance(where.file_ref, int):
        return FileSlice(where.file_ref, where.offset + begin, plain.nbytes, plain.data_ptr())
    return None


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of plain memory that holds the numbers of a quantised one; any other as it is."""
    return tensor.stored if isinstance(tensor, GgufTensor) else getattr(tensor, "_qdata", tensor)
