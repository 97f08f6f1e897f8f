"""LoRAs with random values for any model."""

from __future__ import annotations

import comfy.sd
import torch


def make_lora(model, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA file's tensors for every second linear weight, in blocks and outside."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    linears = [
        (name, weight)
        for name, weight in model.model.diffusion_model.named_parameters()
        if weight.ndim == 2 and name.endswith(".weight") and min(weight.shape) > 1
    ]
    for name, weight in linears[::2]:
        base = f"diffusion_model.{name.removesuffix('.weight')}"
        lora[f"{base}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.05
        lora[f"{base}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
    return lora


def apply(model, lora, strength: float):
    """As the node LoraLoaderModelOnly does."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
