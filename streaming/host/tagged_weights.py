"""Streams models that the ComfyUI-GGUF pack has loaded: their weights are bytes that say in attributes what they are.

In: a MODEL of that pack. Out: the same, streamed, each layer dequantising by the pack's own code. What that pack's
patcher does with LoRAs is not done here, so a model with LoRAs is refused instead of losing them.
"""

from __future__ import annotations

from typing import Any

import comfy.utils
from comfy.model_patcher import ModelPatcher

from ..engine.codec import codec_for
from .families import Family
from .patcher import NothingToStream, StreamingModelPatcher
from .settings import StreamingSettings

_REMEDY = "load the file with Load Diffusion Model (GGUF, streamed)"


def is_tagged(weight: Any) -> bool:
    return getattr(weight, "tensor_type", None) is not None


class TaggedStreamingModelPatcher(StreamingModelPatcher):
    """A model that the ComfyUI-GGUF pack has loaded, streamed. That pack patches weights in a way of its own."""

    @classmethod
    def from_patcher(
        cls, source: ModelPatcher, settings: StreamingSettings, family: Family | None = None
    ) -> StreamingModelPatcher:
        if any(is_tagged(comfy.utils.get_attr(source.model, key)) for key in source.patches):
            raise NothingToStream(f"it has LoRAs and was loaded by another pack's GGUF loader; {_REMEDY}")
        return super().from_patcher(source, settings, family)

    def add_patches(self, patches: dict[Any, Any], *strengths: float, **options: float) -> list[Any]:
        taken = super().add_patches(patches, *strengths, **options)
        if any(is_tagged(comfy.utils.get_attr(self.model, key)) for key in self.patches):
            raise ValueError(f"LoRAs on a streamed model of another pack's GGUF loader would be lost: {_REMEDY}")
        return taken

    def _take_over(self) -> None:
        """Have codecs that keep what these weights say of themselves; taking a model apart drops it with `data`."""
        was_open = self.stream.is_open
        super()._take_over()
        parts = self.stream.session.parts
        blocks = () if was_open else (*parts.blocks, parts.outside)
        for weight in (weight for block in blocks for weight in block.weights):
            if is_tagged(weight.current()):
                weight.home, weight.codec = weight.current(), codec_for(weight.current())
