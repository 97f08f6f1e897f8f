"""A LoRA with random values on every large matrix of a model, as a person has several.

In: a host's model patcher. Out: a clone of it with the LoRA, which the host has loaded from a file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Smaller matrices, such as those of time embeddings and norms, have none in published LoRAs of blocks.
LEAST_ELEMENTS = 2**16
SPREAD = 0.02


def random_lora(model: Any, rank: int, seed: int = 0) -> dict[str, Any]:
    """The tensors of a LoRA file of `rank`, bf16, for every matrix of the diffusion model that is large enough."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if weight.ndim == 2 and name.endswith(".weight") and weight.numel() >= LEAST_ELEMENTS:
            base, (rows, columns) = f"diffusion_model.{name.removesuffix('.weight')}", weight.shape
            tensors[f"{base}.lora_up.weight"] = SPREAD * torch.randn(rows, rank, generator=generator)
            tensors[f"{base}.lora_down.weight"] = SPREAD * torch.randn(rank, columns, generator=generator)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def load_lora(model: Any, rank: int, checkpoint: Path) -> dict[str, Any]:
    """The same as the host reads it from a file, which is written beside `checkpoint` unless it is there."""
    import comfy.utils
    from safetensors.torch import save_file

    path = checkpoint.with_name(f"{checkpoint.stem}-lora-{rank}.safetensors")
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        save_file(random_lora(model, rank), unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # what the system has still to write to the disk holds up whoever maps it
        unfinished.replace(path)
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def apply_lora(model: Any, lora: dict[str, Any], strength: float) -> Any:
    """A clone of `model` with the LoRA, as the node for it makes one."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]
