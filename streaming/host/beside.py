"""Models that a run has on the card beside the streamed one: control models, and what patches bring.

ComfyUI makes room for the models that a run loads, but not among these: a streamed model that has taken all of the card
would leave nothing for a control model that comes to it, which would then be loaded by pieces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher

if TYPE_CHECKING:
    from .patcher import StreamingModelPatcher


def models_beside(patcher: StreamingModelPatcher, conds: Any, model_options: Any) -> tuple[list[ModelPatcher], float]:
    """The models that ComfyUI loads with `patcher` for a run, and the bytes it adds to its estimate for them."""
    helpers = comfy.sampler_helpers
    models, extra_bytes = helpers.get_additional_models(conds, patcher.model_dtype())
    models += helpers.get_additional_models_from_model_options(model_options)
    models += patcher.get_nested_additional_models() + patcher.model_patches_models()
    unlike = (model for model in models if model.load_device == patcher.load_device and not patcher.is_clone(model))
    return list(dict.fromkeys(unlike)), extra_bytes


def give_way(patcher: StreamingModelPatcher) -> None:
    """Before a run loads its models: give up what the others need, if this one is on the card already."""
    stream = patcher.stream
    if stream.is_in_place and stream.missing_bytes:
        lacking_bytes = stream.ways[0].reserve_bytes - stream.device.free_bytes()
        if lacking_bytes > 0:
            patcher.partially_unload(patcher.offload_device, lacking_bytes)
