"""LoRAs and other patches on GGUF weights: applied when a layer runs, since patched values do not fit its blocks.

In: `add_patches` as ComfyUI calls it. Out: patches of plain weights where ComfyUI keeps them, and those of GGUF weights
as weight wrappers, which ComfyUI and the streaming patcher alike hang on a layer when they load it. The arithmetic is
ComfyUI's own, that of its low-memory way. A model that streams keeps what patches hold in page-locked memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.utils
from comfy.model_patcher import ModelPatcher

from ..formats.gguf_tensor import GgufTensor
from .patcher import StreamingModelPatcher
from .run_time_patches import RunTimePatch, lock
from .tagged_weights import TaggedStreamingModelPatcher, is_tagged


class GgufPatches(ModelPatcher if TYPE_CHECKING else object):  # type: ignore[misc]
    """Before a patcher in the order of classes: has it patch GGUF weights when their layers run."""

    def add_patches(self, patches: dict[Any, Any], *strengths: float, **options: float) -> list[Any]:
        taken = super().add_patches(patches, *strengths, **options)
        for key in [key for key in self.patches if self._is_gguf(key)]:
            self.add_weight_wrapper(key, RunTimePatch(key, {key: self.patches.pop(key)}))
        return taken

    def add_hook_patches(self, hook: Any, patches: dict[Any, Any], *strengths: float, **options: float) -> Any:
        taken = super().add_hook_patches(hook, patches, *strengths, **options)
        if any(self._is_gguf(key) for key in self.hook_patches[hook.hook_ref]):
            raise ValueError(
                "LoRAs that are scheduled by hooks change weights in place, which GGUF weights do not allow: apply the "
                "LoRA with Load LoRA, or load the model from a safetensors file"
            )
        return taken

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """What a merge of models starts from: the patches that are applied at run time are part of it."""
        found = super().get_key_patches(filter_prefix)
        for key, functions in self.weight_wrapper_patches.items():
            if key in found:
                for function in functions:
                    found[key] += function.patches[key] if isinstance(function, RunTimePatch) else []
        return found

    def model_size(self) -> int:
        """Bytes; ComfyUI 0.3.75 multiplies by fractions of one on its way."""
        return int(super().model_size())

    def _is_gguf(self, key: str) -> bool:
        return isinstance(comfy.utils.get_attr(self.model, key), GgufTensor)


class GgufModelPatcher(GgufPatches, ModelPatcher):
    """A model of GGUF weights under ComfyUI's own memory manager."""

    @classmethod
    def adopt(cls, patcher: ModelPatcher) -> GgufModelPatcher:
        """Make a patcher that was just made for GGUF weights one that knows how to patch them."""
        assert type(patcher) is ModelPatcher
        patcher.__class__ = cls
        patcher.size = 0  # ComfyUI 0.3.75 counts a text encoder before its weights are loaded
        return patcher  # type: ignore[return-value]


class GgufStreamingModelPatcher(GgufPatches, StreamingModelPatcher):
    """A model of GGUF weights that streams."""

    def load(self, *arguments: Any, **options: Any) -> None:
        lock(self.applied_patches, self.stream.device)
        super().load(*arguments, **options)


def streaming_patcher_for(model: ModelPatcher) -> type[StreamingModelPatcher]:
    """The class that streams `model`."""
    if isinstance(model, GgufPatches):
        return GgufStreamingModelPatcher
    has_tagged = any(is_tagged(weight) for weight in model.model.parameters())
    return TaggedStreamingModelPatcher if has_tagged else StreamingModelPatcher
