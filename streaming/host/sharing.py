"""Models that share a card: who leaves for whom beyond what ComfyUI sees to.

ComfyUI makes room for the models that a run loads, but not among these: a streamed model that has taken all of the card
would leave nothing for a control model that comes to it, which would then be loaded by pieces. And it knows nothing of
budgets: where a person gave several streamed models one, it is one for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher

from .settings import GIB

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


def make_room(patcher: StreamingModelPatcher) -> None:
    """Before a run loads its models: give up what the others need, if this one is on the card already."""
    stream = patcher.stream
    if stream.is_in_place and stream.missing_bytes:
        lacking_bytes = stream.ways[0].reserve_bytes - stream.device.free_bytes()
        if lacking_bytes > 0:
            patcher.partially_unload(patcher.offload_device, lacking_bytes)


def share_budget(patcher: StreamingModelPatcher) -> None:
    """Before `patcher` loads: have models with budgets leave the card, so that all of them keep to the one it has."""
    if patcher.settings.vram_gib <= 0:
        return
    budget_bytes = int(patcher.settings.vram_gib * GIB)
    for_others = max(0, budget_bytes - patcher.stream.session.total_bytes)
    others = idle_beside(patcher)
    held = sum(other.loaded_size() for other in others)
    for other in others:
        if held <= for_others:
            break
        before = other.loaded_size()
        if other.partially_unload(other.offload_device, held - for_others) < held - for_others:
            other.detach()
        held -= before - other.loaded_size()


def idle_beside(patcher: StreamingModelPatcher) -> list[StreamingModelPatcher]:
    """The other streamed models with a budget of their own on the card of `patcher`, that no run uses."""
    loaded = (entry for entry in comfy.model_management.current_loaded_models if not entry.currently_used)
    models = (entry.model for entry in loaded)
    return [
        model
        for model in models
        if isinstance(model, type(patcher))
        and model.stream is not patcher.stream
        and model.load_device == patcher.load_device
        and model.settings.vram_gib > 0
    ]
