"""What ComfyUI saves of a model, and how two such files compare."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import safetensors.torch
import torch


def saved(model, path: Path) -> dict[str, torch.Tensor]:
    """The tensors that ComfyUI's nodes for saving write."""
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(path), model)
    return safetensors.torch.load_file(path)


def assert_same(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), name
