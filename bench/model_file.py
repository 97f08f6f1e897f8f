"""What a benchmark needs to know of a model file without loading it, whether safetensors or GGUF."""

from __future__ import annotations

from pathlib import Path

from bench import checkpoint


def is_gguf(path: str) -> bool:
    return Path(path).suffix.lower() == ".gguf"


def last_axis(path: str, name: str) -> int:
    """Length of the last axis of the tensor called `name`, with any prefix.

    Raises KeyError when the file has no such tensor: it is another family's.
    """
    if not is_gguf(path):
        return checkpoint.last_axis(path, name)
    from gguf import GGUFReader

    for tensor in GGUFReader(path).tensors:
        if tensor.name == name or tensor.name.endswith("." + name):
            return int(tensor.shape[0])  # GGUF's order of axes is the other way round
    raise KeyError(f"{path} has no tensor `{name}`: it belongs to another family")
