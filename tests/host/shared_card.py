"""One simulated card for several models, in a process where ComfyUI's own memory manager looks after it.

ComfyUI frees nothing on a processor, so models load on `cpu:0`, which is the processor by another name. What ComfyUI is
told to be free there is what is left of the simulated card beside all models. Compute is on the plain `cpu`, where it
asks for free memory to choose its attention's pieces and its batches, which must not depend on the card.
"""

from __future__ import annotations

import weakref

import comfy.model_management
import comfy.sampler_helpers
import torch
from layerstream.streaming.host.devices import device_for
from layerstream.streaming.host.patcher import StreamingModelPatcher

from streamed import GIB, on_simulated_card

CARD = torch.device("cpu", 0)


class SharedCard:
    """A simulated card of `size_bytes`, and what is on it."""

    def __init__(self, monkeypatch, size_bytes: int) -> None:
        management = comfy.model_management
        on_simulated_card(monkeypatch, size_gib=size_bytes / GIB)
        self.device = device_for(CARD)
        self.size_bytes = self.device.budget_bytes
        self._others: weakref.WeakSet = weakref.WeakSet()
        self.most_bytes = 0
        """The most that was ever on the card, of all models."""
        allocate = self.device.allocate

        def allocate_and_count(size: int) -> torch.Tensor:
            memory = allocate(size)
            self.most_bytes = max(self.most_bytes, self.used_bytes)
            return memory

        load = management.LoadedModel.model_load

        def load_and_count(entry, *args, **kwargs):
            if not isinstance(entry.model, StreamingModelPatcher):
                self._others.add(entry.model)
            loaded = load(entry, *args, **kwargs)
            self.most_bytes = max(self.most_bytes, self.used_bytes)
            return loaded

        monkeypatch.setattr(self.device, "allocate", allocate_and_count)
        monkeypatch.setattr(management.LoadedModel, "model_load", load_and_count)
        monkeypatch.setattr(self.device, "free_bytes", lambda: self.size_bytes - self.used_bytes)
        monkeypatch.setattr(self.device, "holds_activations", True, raising=False)
        self._free_elsewhere = management.get_free_memory
        monkeypatch.setattr(management, "get_torch_device", lambda: CARD)
        monkeypatch.setattr(management, "get_free_memory", self._free_memory)
        monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", 0)
        monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda *_: (0, 0))

    def _free_memory(self, device=None, torch_free_too=False):
        if device is not None and device != CARD:
            return self._free_elsewhere(device, torch_free_too)
        free_bytes = self.device.free_bytes()
        return (free_bytes, free_bytes) if torch_free_too else free_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes on the card: what streamed models took, and other models as they say."""
        return self.device.used_bytes + sum(model.loaded_size() for model in self._others)


def host_addresses(streamed) -> set[int]:
    """Where the host memory of a streamed model's weights lies."""
    return {weight.home.data_ptr() for block in streamed.stream.session.parts.blocks for weight in block.weights}
