"""Stands in for the ComfyUI-GGUF pack: tensors and layers with the interface of its own."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from layerstream.streaming.formats.dequantise import dequantise
from layerstream.streaming.formats.gguf_file import GgufFile
from layerstream.streaming.formats.gguf_tensor import GgufTensor


class TaggedTensor(torch.Tensor):
    """Bytes that say in attributes what they stand for, and keep saying so where that pack's tensors do."""

    def __new__(cls, *arguments, tensor_type, tensor_shape, patches=(), **options):
        return super().__new__(cls, *arguments, **options)

    def __init__(self, *arguments, tensor_type, tensor_shape, patches=(), **options):
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, patches

    def to(self, *arguments, **options):
        moved = super().to(*arguments, **options)
        moved.tensor_type, moved.patches = self.tensor_type, list(self.patches)
        moved.tensor_shape = self.tensor_shape
        return moved

    def detach(self):
        return self

    def clone(self, *arguments, **options):
        return self

    @property
    def shape(self):
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()


class TaggedOperations(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *_: Any):
            for name, value in state_dict.items():
                setattr(self, name[len(prefix) :], torch.nn.Parameter(value, requires_grad=False))

        def forward_comfy_cast_weights(self, input):
            weight = self.weight.to(input.device)
            if isinstance(weight, TaggedTensor):
                values = dequantise(weight.as_subclass(torch.Tensor).view(-1), weight.tensor_type, input.dtype)
                weight = values.view(weight.tensor_shape)
            bias = None if self.bias is None else self.bias.to(input.device, input.dtype)
            return torch.nn.functional.linear(input, weight.to(input.dtype), bias)


def load(path) -> comfy.model_patcher.ModelPatcher:
    """A model whose linear layers hold tagged tensors."""

    def tagged(name: str, weight: torch.Tensor) -> torch.Tensor:
        if not isinstance(weight, GgufTensor) or not name.endswith(".weight"):
            return weight
        rows = weight.stored.view(len(weight), -1)
        return TaggedTensor(rows, tensor_type=weight.kind, tensor_shape=weight.shape, patches=[])

    weights = {name: tagged(name, weight) for name, weight in GgufFile(path).tensors().items()}
    options = {"custom_operations": TaggedOperations, "dtype": torch.float32}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)
