"""LoRAs with random values for any model, and ComfyUI's two ways to apply them."""

from __future__ import annotations

import itertools
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch


def make_lora(model, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA file's tensors for every second linear weight, in blocks and outside."""
    return _file(model.model.diffusion_model, "diffusion_model", seed, rank)


def make_text_lora(clip, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """The same for a text encoder, tables of vectors included."""
    return _file(clip.cond_stage_model, "text_encoders", seed, rank)


def _file(module: torch.nn.Module, prefix: str, seed: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    linears = [
        (name, weight)
        for name, weight in module.named_parameters()
        if weight.ndim == 2 and name.endswith(".weight") and min(weight.shape) > 1
    ]
    for name, weight in linears[::2]:
        base = f"{prefix}.{name.removesuffix('.weight')}"
        lora[f"{base}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.05
        lora[f"{base}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
    return lora


def apply(model, lora, strength: float):
    """As the node LoraLoaderModelOnly does."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def on_low_memory(model: Any) -> Any:
    """Have ComfyUI load the weights of `model` and its clones in its low-memory way, none of them patched in place."""

    class OnLowMemory(type(model)):
        def load(self, device_to=None, lowvram_model_memory=0, **options):
            # Of layers that a full load had cast, ComfyUI believes that they are in this way already, with no patches.
            for module in self.model.modules():
                comfy.model_patcher.wipe_lowvram_weight(module)
            super().load(device_to, lowvram_model_memory=1, **{**options, "full_load": False})

    model.__class__ = OnLowMemory
    return model


def assert_survives_faults(patched, sample, expected: torch.Tensor) -> None:
    """The run after one that ran out of memory, or was interrupted, in the middle of a block gives `expected`."""
    for error in (torch.OutOfMemoryError, comfy.model_management.InterruptProcessingException):

        def fail(*_, error=error):
            raise error("in mid-block")

        handle = _at_a_block(patched, fail)
        with pytest.raises(error):
            sample(patched)
        handle.remove()
        comfy.model_management.unload_all_models()
        assert torch.equal(sample(patched), expected)


def assert_survives_a_retry(patched, sample, expected: torch.Tensor) -> None:
    """A run that gets memory at its second try gives `expected`."""
    tries = itertools.count()

    def fail(*_):
        if next(tries) == 0:
            raise torch.OutOfMemoryError("in mid-block")

    handle = _at_a_block(patched, fail)
    assert torch.equal(sample(patched), expected)
    handle.remove()
    assert next(tries) > 1


def _at_a_block(patched, function):
    return patched.model.diffusion_model.single_blocks[1].linear1.register_forward_hook(function)
