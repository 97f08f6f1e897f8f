"""ComfyUI's layers for weights that stay as their GGUF file has them: the `custom_operations` of a GGUF model.

In: a state dict with `GgufTensor`s and plain tensors. Out: layers that hold them as they are and turn them into the
dtype of their input when they run, wherever the bytes lie by then. Only the layers with large weights are here; the
others are ComfyUI's own, whose loading copies values into parameters of the model's dtype.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.ops
import torch

from ..formats.gguf_tensor import GgufTensor

# Larger parameters get no memory of their own before the file's take their place: Windows would commit all of it.
# Smaller ones may be given values when a model is built, which it keeps where the file has none.
LARGE_ELEMENTS = 1 << 22


class _AsStored:
    """What the layers share: loading without a copy, and casting when they run."""

    def __init__(self, *arguments: Any, device: Any = None, **options: Any) -> None:
        super().__init__(*arguments, device="meta", **options)  # type: ignore[call-arg]
        for name, parameter in _own(self).items():
            if parameter.numel() < LARGE_ELEMENTS:
                setattr(self, name, _parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device)))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        own = _own(self)
        # Moving a model that was just built moves nothing that is on no device yet.
        if any(parameter.is_meta for parameter in own.values()):
            return self
        # torch would swap what two tensors hold, which it cannot do while anything refers to one weakly.
        stored = {name: parameter for name, parameter in own.items() if isinstance(parameter, GgufTensor)}
        for name in stored:
            setattr(self, name, None)
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, parameter in stored.items():
            setattr(self, name, _parameter(fn(parameter)))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = _own(self)
        for name, parameter in own.items():
            value = state_dict.get(f"{prefix}{name}")
            if value is None:
                missing_keys.append(f"{prefix}{name}")
                if parameter.is_meta:
                    setattr(self, name, _parameter(torch.zeros_like(parameter, device="cpu")))
            elif value.shape != parameter.shape:
                error_msgs.append(
                    f"`{prefix}{name}` has the shape {tuple(value.shape)}, the model wants {tuple(parameter.shape)}"
                )
            else:
                setattr(self, name, _parameter(value))
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in own]

    def cast(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias as this layer computes with them: in `dtype` on `device`, patched."""
        weight = self.weight.to(device, dtype)  # type: ignore[attr-defined]
        for function in self.weight_function:  # type: ignore[attr-defined]
            weight = function(weight)
        bias = self.bias  # type: ignore[attr-defined]
        if bias is not None:
            bias = comfy.model_management.cast_to(bias, dtype, device, copy=bool(self.bias_function))  # type: ignore[attr-defined]
            for function in self.bias_function:  # type: ignore[attr-defined]
                bias = function(bias)
        return weight, bias


def stop_casting(model: torch.nn.Module) -> None:
    """Have layers that hold their weights in the model's dtype use them as they are, where the model computes in it.

    ComfyUI would give such a model layers that do not cast: casting takes longer on the host than a norm on the card.
    """
    for module in model.modules():
        if hasattr(module, "comfy_cast_weights") and not isinstance(module, _AsStored):
            module.comfy_cast_weights = False  # type: ignore[assignment]


def _own(layer: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


class _Linear(_AsStored, comfy.ops.manual_cast.Linear):
    def forward_comfy_cast_weights(self, input: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if not isinstance(self.weight, GgufTensor):
            return super().forward_comfy_cast_weights(input, *arguments, **options)
        weight, bias = self.cast(input.dtype, input.device)
        return torch.nn.functional.linear(input, weight, bias)


class _Convolution(_AsStored):
    """Before one of ComfyUI's convolutions in the order of classes."""

    def forward_comfy_cast_weights(self, input: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if not isinstance(self.weight, GgufTensor):  # type: ignore[attr-defined]
            return super().forward_comfy_cast_weights(input, *arguments, **options)  # type: ignore[misc]
        weight, bias = self.cast(input.dtype, input.device)
        return self._conv_forward(input, weight, bias, *arguments, **options)  # type: ignore[attr-defined]


class _Embedding(_AsStored, comfy.ops.manual_cast.Embedding):
    def forward_comfy_cast_weights(
        self, input: torch.Tensor, out_dtype: torch.dtype | None = None, **options: Any
    ) -> torch.Tensor:
        weight = self.weight
        if not isinstance(weight, GgufTensor):
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype, **options)
        dtype = out_dtype or weight.dtype
        if self.weight_function or self.max_norm is not None:
            return torch.nn.functional.embedding(
                input, self.cast(dtype, input.device)[0], self.padding_idx, self.max_norm, self.norm_type
            )
        # A few rows of a table that may have gigabytes.
        return weight.rows(input, dtype)


class GgufOperations(comfy.ops.manual_cast):
    """Layers that cast when they run, as `manual_cast`'s do, and take GGUF weights."""

    class Linear(_Linear):
        pass

    class Conv1d(_Convolution, comfy.ops.manual_cast.Conv1d):
        pass

    class Conv2d(_Convolution, comfy.ops.manual_cast.Conv2d):
        pass

    class Conv3d(_Convolution, comfy.ops.manual_cast.Conv3d):
        pass

    class Embedding(_Embedding):
        pass
