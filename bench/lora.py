"""A LoRA with random values on every large matrix of a model, as a person has several.

In: a host's model patcher. Out: a clone of it with the LoRA, made by the host's own loader of LoRAs.
"""

from __future__ import annotations

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


def apply_lora(model: Any, lora: dict[str, Any], strength: float) -> Any:
    """A clone of `model` with the LoRA, as the node for it makes one."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]
